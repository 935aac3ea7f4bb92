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
  local key = job_key(id)
  local job = redis.call('HMGET', key, 's', 'p', 't', 'w')
  local change = job[1] and job[2] ~= priority
  if change then
    redis.call('HSET', key, 'p', priority)
    if job[1] == 'w' then
      add('w' .. job[2], -1)
      add('z', 1)
      redis.call('HSET', key, 'q', enter_list(id, priority, job[3], job[4], false))
    end
  end
  answers[#answers + 1] = change and 1 or 0
end
save()
return answers
