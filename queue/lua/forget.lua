#!lua flags=allow-oom
-- Drops waiting and scheduled jobs (cancel). A leased job is left to its worker. The list entry of a waiting job
-- stays behind and is dropped by the claim that meets it.
--
-- KEYS[1]  the partition
-- ARGV     ids
-- Returns  one number per id: 1 dropped, 0 leased or unknown
-- Complexity: O(ids * log(scheduled)); the caller sends at most 500 ids
--@ partition.lua
local answers = {}
for i, id in ipairs(ARGV) do
  local key = job_key(id)
  local job = redis.call('HMGET', key, 's', 'p', 't')
  local dropped = job[1] == 'w' or job[1] == 's'
  if job[1] == 'w' then
    add('w' .. job[2], -1)
    add('z', 1)
  elseif job[1] == 's' then
    redis.call('ZREM', SCHEDULE, id)
  end
  if dropped then
    add_tenant(job[3], -1)
    redis.call('DEL', key)
  end
  answers[i] = dropped and 1 or 0
end
save()
return answers
