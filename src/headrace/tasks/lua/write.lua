-- The owner's only way to change anything: fence and state are checked, then everything happens together. So an event can
-- be seen if and only if its step is journalled, and a result once.
-- ARGV  id, fence, number of this write, field of the journal ("" for none), its value, then what becomes of the task:
--         "" it goes on · complete (result JSON) · fail (error JSON) · ask (JSON) · sleep (until ms) · release
--       its argument, ttl in ms, and any number of events
-- ->    {1, turn} done · {0, "fence"} another worker has it · {0, state} it is not running any more
local id, fence, write, field, value, change, argument, ttl =
  ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7], ARGV[8]
local row = redis.call('HMGET', TASK, 'fence', 'state', 'last', 'turn', 'lane')
if row[1] ~= fence then
  return {0, 'fence'}
end
if row[3] == write then
  return {1, tonumber(row[4])}
end
if row[2] ~= 'running' then
  return {0, row[2]}
end
redis.call('HSET', TASK, 'last', write)
if field ~= '' then
  redis.call('HSETNX', JOURNAL, field, value)
end
local last = #ARGV
if change == 'complete' or change == 'fail' then
  last = last - 1
end
for i = 9, last do
  emit(ARGV[i])
end
local now = now_ms()
if change == 'complete' then
  finish(id, 'completed', 'result', argument, ARGV[#ARGV], ttl)
elseif change == 'fail' then
  finish(id, 'failed', 'error', argument, ARGV[#ARGV], ttl)
elseif change ~= '' then
  redis.call('HINCRBY', TASK, 'crashes', -1)
  if change == 'ask' then
    redis.call('HSET', TASK, 'state', 'input_required', 'ask', argument, 'updated', whole(now))
    return {1, redis.call('HINCRBY', TASK, 'turn', 1)}
  end
  local at = now
  if change == 'sleep' then
    at = tonumber(argument)
    redis.call('HSET', TASK, 'wake', argument)
  end
  return {1, enqueue(id, row[5], now, at)}
else
  redis.call('HSET', TASK, 'updated', whole(now))
end
return {1, tonumber(row[4])}
