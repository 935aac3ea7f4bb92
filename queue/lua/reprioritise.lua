#!lua
-- Gives jobs another priority. A waiting job goes to the end of its tenant's list there with a new sequence number;
-- its old entry stays behind and is dropped by the claim that meets it.
--
-- KEYS[1]  the partition
-- ARGV     2 per job: id, priority
-- Returns  one number per job: 1 changed, 0 unknown or has that priority already
-- Complexity: O(jobs); the caller sends at most 500 jobs
--@ partition.lua
local answers = {}
for i = 1, #ARGV, 2 do
  local id, priority = ARGV[i], ARGV[i + 1]
  local seq, old, since, tenant, body, charged = read(redis.call('HGET', JOBS, id))
  local change = seq and old ~= priority
  if change then
    if seq ~= '0' and redis.call('HEXISTS', HOLDERS, id) == 0 then
      add('w' .. old, -1)
      add('z', 1)
      add_tenant(tenant, -1)
      seq = enter_list(id, priority, tenant, since, false)
    end
    redis.call('HSET', JOBS, id, record(seq, priority, since, tenant, body, charged))
  end
  answers[#answers + 1] = change and 1 or 0
end
save()
return answers
