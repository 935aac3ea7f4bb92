#!lua flags=allow-oom
-- Takes in what one process knows of one dependency, and says what all of them know and whose turn it is to probe it.
--
-- KEYS[1]  the board of circuit breakers
-- ARGV[1]  now_ms, or '' for Redis' clock
-- ARGV[2]  the worker that speaks
-- ARGV[3]  the dependency
-- ARGV[4]  'open' its breaker is open, also if it said so before; 'closed' it has closed; 'look' it only asks
-- ARGV[5]  after how many ms of silence a report is forgotten
-- ARGV[6]  how many ms a turn takes
-- Returns  how many workers report it open; since when (ms, 0: none does); whose turn it is, or nil; ms until the next
--          turn; when a breaker of it closed last (ms, 0: never)
-- Complexity: O(log n + forgotten + reports before the one whose turn it is)
--@ clock.lua
local board, worker, dependency = KEYS[1], ARGV[2], ARGV[3]
local now = clock(ARGV[1])
local turn = tonumber(ARGV[6])
-- Who reports it by since when, which keeps their order, and by when they are forgotten.
local since, silent = board .. ':s:' .. dependency, board .. ':u:' .. dependency
local gone = redis.call('ZRANGE', silent, '-inf', now, 'BYSCORE', 'LIMIT', 0, 100)
if #gone > 0 then
  redis.call('ZREM', silent, unpack(gone))
  redis.call('ZREM', since, unpack(gone))
end
local closed = tonumber(redis.call('HGET', board, dependency) or '0')
if ARGV[4] == 'open' then
  redis.call('ZADD', silent, now + tonumber(ARGV[5]), worker)
  if redis.call('ZADD', since, 'NX', now, worker) == 1 then
    redis.call('PUBLISH', board .. ':news', 'open ' .. dependency .. ' ' .. worker)
  end
elseif ARGV[4] == 'closed' then
  redis.call('ZREM', silent, worker)
  -- Many close at the same time; one of them tells, and who closes late enough to be news again.
  if redis.call('ZREM', since, worker) == 1 and now - closed >= 500 then
    closed = now
    redis.call('HSET', board, dependency, now)
    redis.call('PUBLISH', board .. ':news', 'closed ' .. dependency .. ' ' .. worker)
  end
end
local count = redis.call('ZCARD', since)
if count == 0 then return {0, 0, false, 0, closed} end
local first = redis.call('ZRANGE', since, 0, 0, 'WITHSCORES')
local place = math.floor(now / turn) % count
local whose = redis.call('ZRANGE', since, place, place)
return {count, tonumber(first[2]), whose[1], turn - now % turn, closed}
