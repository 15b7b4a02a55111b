-- Ends a task from outside: cancelled by a client, or its deadline passed while no worker had it.
-- ARGV  id, state, error JSON, event, ttl in ms, "late" to do so only past the deadline
-- ->    {"done", agent, created, lane} · {"no", state} it had ended, or is not late · {"missing"}
local id, state, problem, event, ttl, when = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local row = redis.call('HMGET', TASK, 'state', 'deadline', 'agent', 'created', 'lane')
if not row[1] then
  redis.call('ZREM', OPEN, id)
  return {'missing'}
end
if is_end(row[1]) or (when == 'late' and tonumber(row[2]) > now_ms()) then
  return {'no', row[1]}
end
finish(id, state, 'error', problem, event, ttl)
redis.call('PUBLISH', ARGV[7], id)
return {'done', row[3], row[4], row[5]}
