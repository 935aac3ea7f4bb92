#!lua flags=allow-oom
-- Notes that a worker lives, and which queues there are; forgets workers and queues of which nothing was heard for long.
--
-- KEYS[1]  the registry
-- ARGV[1]  now_ms, or '' for Redis' clock
-- ARGV[2]  after how many ms of silence a worker is forgotten
-- ARGV[3]  after how many ms of silence a queue is forgotten
-- ARGV[4]  how many workers, and how many queues, to keep at most
-- ARGV[5]  the worker's record, JSON, or '' if no worker speaks
-- ARGV[6]  the worker, or ''
-- ARGV[7…] names of queues
-- Returns  how many workers are known
-- Complexity: O(queues * log n + forgotten)
--@ clock.lua
local registry = KEYS[1]
local workers, records, queues = registry .. ':w', registry .. ':i', registry .. ':q'
local now = clock(ARGV[1])
local keep = tonumber(ARGV[4])
if ARGV[6] ~= '' then
  redis.call('ZADD', workers, now, ARGV[6])
  redis.call('HSET', records, ARGV[6], ARGV[5])
end
for i = 7, #ARGV do redis.call('ZADD', queues, now, ARGV[i]) end

-- At most 100 per call; the next call goes on.
local function forget(set, silence)
  local old = redis.call('ZRANGE', set, '-inf', now - silence, 'BYSCORE', 'LIMIT', 0, 100)
  local over = redis.call('ZCARD', set) - #old - keep
  if over > 0 then old = redis.call('ZRANGE', set, 0, math.min(#old + over, 100) - 1) end
  if #old > 0 then redis.call('ZREM', set, unpack(old)) end
  return old
end
local gone = forget(workers, tonumber(ARGV[2]))
if #gone > 0 then redis.call('HDEL', records, unpack(gone)) end
for _, queue in ipairs(forget(queues, tonumber(ARGV[3]))) do redis.call('DEL', registry .. ':n:' .. queue) end
return redis.call('ZCARD', workers)
