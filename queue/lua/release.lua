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
--@ policies.lua
local now = clock(ARGV[1])
local answers, counts = {}, {}
-- From the last to the first, so that jobs released together keep their order in front.
for i = #ARGV - 2, 3, -3 do
  local id, delay = ARGV[i], tonumber(ARGV[i + 2])
  local ours, counted = held_by(redis.call('HGET', HOLDERS, id), ARGV[i + 1])
  local _, priority, since, tenant, body, charged = read(ours and redis.call('HGET', JOBS, id))
  if ours then
    redis.call('ZREM', LEASES, id)
    redis.call('HDEL', HOLDERS, id)
    freed = true
    if counted then counts[counted] = (counts[counted] or 0) + 1 end
  end
  if ours and priority then
    local seq = 0
    if ARGV[2] == '1' or charged ~= '' then charged = charge(charged, tonumber(ARGV[2]), 0) end
    if delay > 0 then
      redis.call('ZADD', SCHEDULE, now + delay, id)
      add_tenant(tenant, 1)
    else
      seq = enter_list(id, priority, tenant, since, true)
    end
    redis.call('HSET', JOBS, id, record(seq, priority, since, tenant, body, charged))
  end
  answers[i / 3] = ours and 1 or 0
end
if ended(counts) then grown = true end
save()
return answers
