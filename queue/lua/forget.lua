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
  local held = redis.call('HEXISTS', HOLDERS, id) == 1
  local seq, priority, _, tenant = read(not held and redis.call('HGET', JOBS, id))
  if seq == '0' then
    redis.call('ZREM', SCHEDULE, id)
  elseif seq then
    add('w' .. priority, -1)
    add('z', 1)
  end
  if seq then
    add_tenant(tenant, -1)
    redis.call('HDEL', JOBS, id)
  end
  answers[i] = seq and 1 or 0
end
save()
return answers
