#!lua
-- The least that storing jobs can cost: the payloads, and one list of their ids.
--
-- KEYS[1]  the list
-- KEYS[2]  hash: payload by id
-- ARGV     2 per job: id, payload
-- Returns  how many ids the list holds now
-- Complexity: O(jobs); the caller sends one batch
local ids = {}
for i = 1, #ARGV, 2 do ids[#ids + 1] = ARGV[i] end
redis.call('HSET', KEYS[2], unpack(ARGV))
return redis.call('RPUSH', KEYS[1], unpack(ids))
