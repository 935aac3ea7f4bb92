#!lua flags=allow-oom
-- Gives leased jobs back: to the front of their list, or to the schedule.
--
-- KEYS[1]  the partition
-- ARGV[1]  now_ms, or '' for Redis' clock
-- ARGV[2]  1 if the jobs are charged with a failure, else 0
-- ARGV[3…] 3 per job: id, token, delay in ms (0: wait at the front)
-- Returns  one number per job: 1 given back, 0 not ours
-- Complexity: O(jobs * log(leased + scheduled)); the caller sends at most 500 jobs
--@ partition.lua
local now = clock(ARGV[1])
local answers = {}
-- From the last to the first, so that jobs released together keep their order in front.
for i = #ARGV - 2, 3, -3 do
  local id, delay = ARGV[i], tonumber(ARGV[i + 2])
  local key = job_key(id)
  local job = redis.call('HMGET', key, 's', 'x', 'p', 't', 'w')
  local ours = job[1] == 'l' and job[2] == ARGV[i + 1]
  if ours then
    redis.call('ZREM', LEASES, id)
    redis.call('HDEL', key, 'x', 'o')
    if ARGV[2] == '1' then redis.call('HINCRBY', key, 'a', 1) end
    if delay > 0 then
      redis.call('ZADD', SCHEDULE, now + delay, id)
      redis.call('HSET', key, 's', 's')
    else
      local since = job[5] or now
      local seq = enter_list(id, job[3], job[4], since, true)
      redis.call('HSET', key, 's', 'w', 'q', seq, 'w', since)
    end
    add_tenant(job[4], 1)
  end
  answers[i / 3] = ours and 1 or 0
end
save()
return answers
