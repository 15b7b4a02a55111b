-- Accepts a task, once per key of idempotency.
-- ARGV  id, agent, lane, model, input, owner, timeout in ms, bound of open tasks, key 11 used ("1" or ""), digest, event
-- ->    {"new", turn} · {"known", id, state, turn, lane} · {"conflict", id} · {"full", number of open tasks}
local id, agent, lane, model, input, owner = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local timeout, bound, keyed, digest, event = tonumber(ARGV[7]), tonumber(ARGV[8]), ARGV[9], ARGV[10], ARGV[11]
if keyed ~= '' then
  local known = redis.call('HMGET', KEYS[11], 'id', 'digest', 'task')
  if known[1] then
    if known[2] ~= digest then
      return {'conflict', known[1]}
    end
    local row = redis.call('HMGET', known[3], 'state', 'turn', 'lane')
    return {'known', known[1], row[1], row[2], row[3]}
  end
end
local open = redis.call('ZCARD', OPEN)
if open >= bound then
  return {'full', open}
end
local now = now_ms()
redis.call('HSET', TASK, 'agent', agent, 'lane', lane, 'model', model, 'input', input, 'owner', owner,
  'fence', 0, 'turn', 0, 'crashes', 0, 'created', whole(now), 'deadline', whole(now + timeout), 'timeout', whole(timeout),
  'idem', keyed ~= '' and KEYS[11] or '', 'seq', 0)
if keyed ~= '' then
  redis.call('HSET', KEYS[11], 'id', id, 'digest', digest, 'task', TASK)
end
redis.call('ZADD', OPEN, whole(now + timeout), id)
redis.call('ZADD', ALL, whole(now), id)
local turn = enqueue(id, lane, now, now)
emit(event)
return {'new', turn}
