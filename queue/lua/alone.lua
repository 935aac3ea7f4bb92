#!lua flags=allow-oom
-- Notes that a job runs alone in its process from now on: if this lease is lost, the job may be to blame. For jobs without a
-- ledger.
--
-- KEYS[1]  the partition
-- ARGV     2 per job: id, token
-- Returns  one number per job: 1 noted, 0 not ours
-- Complexity: O(jobs); the caller sends at most 500 jobs
--@ partition.lua
--@ policies.lua
local answers = {}
for i = 1, #ARGV, 2 do
  local id = ARGV[i]
  local ours = held_by(redis.call('HGET', HOLDERS, id), ARGV[i + 1])
  local seq, priority, since, tenant, body, charged = read(ours and redis.call('HGET', JOBS, id))
  if seq then
    charged = string.gsub(charge(charged, 0, 0), '0$', '1')
    redis.call('HSET', JOBS, id, record(seq, priority, since, tenant, body, charged))
  end
  answers[#answers + 1] = seq and 1 or 0
end
return answers
