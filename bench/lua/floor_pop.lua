#!lua
-- The least that taking jobs can cost: pop, fetch, delete. A worker that dies loses what it popped.
--
-- KEYS[1]  the list
-- KEYS[2]  hash: payload by id
-- ARGV[1]  how many jobs at most
-- Returns  the payloads
-- Complexity: O(jobs)
local ids = redis.call('LPOP', KEYS[1], ARGV[1])
if not ids then return {} end
local payloads = redis.call('HMGET', KEYS[2], unpack(ids))
redis.call('HDEL', KEYS[2], unpack(ids))
return payloads
