-- A worker takes up a task: from here on the former owner cannot write.
-- ARGV  id, turn of the delivery, most crashes, ttl in ms, error and final event for: too many crashes, too late; then the
--       delivery's id, which stays the same when it is given to another worker
-- ->    {"run", row, journal} · {"stop"} nothing to do · {"ended", state, agent, created, lane} it had to be given up
local id, turn, most, ttl = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
local row = redis.call('HMGET', TASK, 'state', 'turn', 'crashes', 'deadline', 'agent', 'created', 'message', 'lane')
local state = row[1]
if not state or is_end(state) or state == 'input_required' or row[2] ~= turn then
  return {'stop'}
end
if state == 'running' and row[7] ~= ARGV[9] then
  return {'stop'}
end
local now = now_ms()
if tonumber(row[4]) <= now then
  finish(id, 'failed', 'error', ARGV[7], ARGV[8], ttl)
  return {'ended', 'timeout', row[5], row[6], row[8]}
end
if tonumber(row[3]) >= most then
  finish(id, 'failed', 'error', ARGV[5], ARGV[6], ttl)
  return {'ended', 'error', row[5], row[6], row[8]}
end
unqueue(id)
redis.call('HSET', TASK, 'state', 'running', 'updated', whole(now), 'message', ARGV[9])
redis.call('HDEL', TASK, 'wake', 'last')
redis.call('HINCRBY', TASK, 'crashes', 1)
local fence = redis.call('HINCRBY', TASK, 'fence', 1)
local journal = redis.call('HGETALL', JOURNAL)
emit('{"type":"RUN_STARTED","threadId":"' .. id .. '","runId":"' .. id .. '","timestamp":' .. whole(now) ..
  ',"metadata":{"attempt":' .. fence .. ',"resumedSteps":' .. #journal / 2 .. '}}')
return {'run', redis.call('HGETALL', TASK), journal}
