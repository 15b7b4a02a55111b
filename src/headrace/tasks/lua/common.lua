-- What every script begins with. All keys of a store share the hash tag {hr}, so that a Redis Cluster keeps them together.
--
-- KEYS, the same in each script; T is a task's id, a random string
--   1  {hr}:task:T        hash    one task:
--        agent, lane, model    names; model is what the client asked for, may be empty
--        state                 pending, running, input_required, completed, failed, cancelled
--        input                 JSON
--        owner                 digest of the API key that made it, empty without keys
--        fence                 times that a worker took it up; only the holder of the newest may write
--        turn                  times that it was queued; a delivery of an older turn is stale
--        message               the delivery that it runs for: a second one of the same turn has nothing to run
--        crashes               attempts that ended without a word
--        created, updated      ms since 1970, by the store's clock
--        deadline, timeout     ms since 1970; ms
--        wake                  ms since 1970: a sleeping task is queued then
--        ask                   JSON of what it waits for: field of the journal, prompt, schema
--        result, error         JSON, one of them at the end
--        idem                  its key of idempotency, empty without one
--        seq, final            number of the newest event; stream id of the final one
--        last                  the newest write, so that one whose reply was lost is not done twice
--   2  {hr}:journal:T     hash    "n:name" -> JSON value of step n (n.m within the body of step n)
--   3  {hr}:events:T      stream  e: JSON of an AG-UI event; n: its number, from 1
--   4  {hr}:open          zset    tasks that are not at their end, by deadline
--   5  {hr}:all           zset    all tasks, by time of creation; the rows of old ones may have gone
--   6  {hr}:unsent        zset    tasks that ought to be in a queue, by when; a task leaves it once it is there
--   7-9  {hr}:queue:LANE  zset    pending tasks of the lanes interactive, default, batch, by when they were queued
--   10 {hr}:done          string  how many have ever ended
--   11 {hr}:idem:…        hash    id, digest of the body
-- Channels: {hr}:events:T  "id n JSON" of each event;  {hr}:control  ids of tasks that were ended from outside

local TASK, JOURNAL, EVENTS, OPEN, ALL, UNSENT, DONE = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6], KEYS[10]
local QUEUE = {interactive = KEYS[7], default = KEYS[8], batch = KEYS[9]}
local MOST_EVENTS = 10000

local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

local function whole(number)
  return string.format('%.0f', number)
end

local function is_end(state)
  return state == 'completed' or state == 'failed' or state == 'cancelled'
end

local function emit(event)
  local n = redis.call('HINCRBY', TASK, 'seq', 1)
  local id = redis.call('XADD', EVENTS, 'MAXLEN', '~', MOST_EVENTS, '*', 'e', event, 'n', n)
  redis.call('PUBLISH', EVENTS, id .. ' ' .. n .. ' ' .. event)
  return id
end

local function unqueue(id)
  redis.call('ZREM', UNSENT, id)
  for _, key in pairs(QUEUE) do
    redis.call('ZREM', key, id)
  end
end

-- It waits for a worker from `at` on. The caller hands it to the queue, and takes it out of UNSENT then.
local function enqueue(id, lane, now, at)
  redis.call('HSET', TASK, 'state', 'pending', 'updated', whole(now))
  redis.call('ZADD', UNSENT, whole(at), id)
  if at <= now then
    redis.call('ZADD', QUEUE[lane], whole(now), id)
  end
  return redis.call('HINCRBY', TASK, 'turn', 1)
end

local function expire(ttl_ms)
  redis.call('PEXPIRE', TASK, ttl_ms)
  redis.call('PEXPIRE', JOURNAL, ttl_ms)
  redis.call('PEXPIRE', EVENTS, ttl_ms)
  local idem = redis.call('HGET', TASK, 'idem')
  if idem and idem ~= '' then
    redis.call('PEXPIRE', idem, ttl_ms)
  end
end

-- The end: one state, one result or error, one final event. `field` is result or error.
local function finish(id, state, field, value, event, ttl_ms)
  redis.call('HSET', TASK, 'state', state, field, value, 'updated', whole(now_ms()))
  redis.call('HDEL', TASK, 'ask', 'wake')
  redis.call('ZREM', OPEN, id)
  unqueue(id)
  redis.call('HSET', TASK, 'final', emit(event))
  redis.call('INCR', DONE)
  expire(ttl_ms)
end

