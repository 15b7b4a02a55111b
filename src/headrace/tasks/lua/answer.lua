-- The answer that a task in input_required waits for.
-- ARGV  id, field of the journal that it was asked for, value as JSON, event
-- ->    {"queued", turn, lane} · {"no", state} · {"missing"}
local id, field, value, event = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local row = redis.call('HMGET', TASK, 'state', 'lane', 'ask')
if not row[1] then
  return {'missing'}
end
if row[1] ~= 'input_required' or cjson.decode(row[3]).field ~= field then
  return {'no', row[1]}
end
redis.call('HSETNX', JOURNAL, field, value)
redis.call('HDEL', TASK, 'ask')
local now = now_ms()
local turn = enqueue(id, row[2], now, now)
emit(event)
return {'queued', turn, row[2]}
