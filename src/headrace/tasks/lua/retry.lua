-- A failed or cancelled task once more, with its journal or (fresh) without, within a new deadline.
-- ARGV  id, "1" for fresh, bound of open tasks, event
-- ->    {"queued", turn, lane} · {"no", state} · {"full", number of open tasks} · {"missing"}
local id, fresh, bound, event = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
local row = redis.call('HMGET', TASK, 'state', 'lane', 'timeout', 'final', 'idem')
if not row[1] then
  return {'missing'}
end
if row[1] ~= 'failed' and row[1] ~= 'cancelled' then
  return {'no', row[1]}
end
local open = redis.call('ZCARD', OPEN)
if open >= bound then
  return {'full', open}
end
redis.call('PERSIST', TASK)
redis.call('PERSIST', JOURNAL)
redis.call('PERSIST', EVENTS)
if row[5] and row[5] ~= '' then
  redis.call('PERSIST', row[5])
end
if fresh ~= '' then
  redis.call('DEL', JOURNAL)
end
-- What was final is so no more: whoever reads from the beginning must not stop there.
redis.call('XDEL', EVENTS, row[4])
local now = now_ms()
redis.call('HDEL', TASK, 'error', 'result', 'final', 'last')
redis.call('HSET', TASK, 'crashes', 0, 'deadline', whole(now + row[3]))
redis.call('ZADD', OPEN, whole(now + row[3]), id)
local turn = enqueue(id, row[2], now, now)
emit(event)
return {'queued', turn, row[2]}
