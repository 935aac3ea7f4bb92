#!lua flags=allow-oom
-- Puts jobs whose lease expired back to the front of their lists.
--
-- KEYS[1]  the partition
-- ARGV[1]  now_ms, or '' for Redis' clock
-- ARGV[2]  how many at most
-- Returns  {1 if more have expired, then the ids}
-- Complexity: O(reaped * log(leased))
--@ partition.lua
local now, max = clock(ARGV[1]), tonumber(ARGV[2])
local expired = redis.call('ZRANGE', LEASES, '-inf', now, 'BYSCORE', 'LIMIT', 0, max)
local answer = { #expired == max and 1 or 0 }
-- From the latest to the earliest, so that the one that expired first ends up in front.
for i = #expired, 1, -1 do
  local id = expired[i]
  local key = job_key(id)
  local job = redis.call('HMGET', key, 's', 'p', 't', 'w')
  if job[1] == 'l' then
    local since = job[4] or now
    local seq = enter_list(id, job[2], job[3], since, true)
    redis.call('HDEL', key, 'x', 'o')
    redis.call('HSET', key, 's', 'w', 'q', seq, 'w', since)
    add_tenant(job[3], 1)
    answer[#answer + 1] = id
  end
end
if #expired > 0 then redis.call('ZREM', LEASES, unpack(expired)) end
save()
return answer
