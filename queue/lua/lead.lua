#!lua flags=allow-oom
-- Takes or keeps a role that one process at a time should have. Only for thrift: nothing breaks where two have it.
--
-- KEYS[1]  who has the role
-- ARGV[1]  a name that nobody else has
-- ARGV[2]  for how long, ms
-- Returns  1 if the role is ours now, else 0
-- Complexity: O(1)
local leader = redis.call('GET', KEYS[1])
if leader and leader ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
