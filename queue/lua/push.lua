#!lua
-- Stores jobs that are not known yet: waiting now, or scheduled.
-- Refused by Redis itself when its memory is full, because it has no allow-oom flag.
--
-- KEYS[1]  the partition
-- ARGV[1]  now_ms, or '' for Redis' clock
-- ARGV[2]  window: how many jobs may wait, and how many may be scheduled
-- ARGV[3]  a random name for this life of the data, if it has none yet
-- ARGV[4…] 9 per job: id, kind, priority, tenant, run_at_ms or '', enqueued_at_ms, traceparent or '',
--          tracestate or '', fast record or ''
-- Returns  one number per job: 1 queued, 0 was present (left as it is), 2 the window is full
-- Complexity: O(jobs), O(log n) for a scheduled one; the caller sends at most 500 jobs
--@ partition.lua
local now, window = clock(ARGV[1]), tonumber(ARGV[2])
begin_epoch(ARGV[3])
local held, scheduled = depth(count) + count.z, redis.call('ZCARD', SCHEDULE)
local answers = {}
for i = 4, #ARGV, 9 do
  local id, priority, tenant, run_at = ARGV[i], ARGV[i + 2], ARGV[i + 3], tonumber(ARGV[i + 4])
  local key, later = job_key(id), run_at and run_at > now
  local answer = 1
  if redis.call('EXISTS', key) == 1 then
    answer = 0
  elseif later and scheduled >= window or not later and held >= window then
    answer = 2
  else
    local fields = { 'k', ARGV[i + 1], 'p', priority, 't', tenant, 'e', ARGV[i + 5] }
    for offset, name in pairs({ [4] = 'r', [6] = 'c', [7] = 'd', [8] = 'f' }) do
      if ARGV[i + offset] ~= '' then
        fields[#fields + 1] = name
        fields[#fields + 1] = ARGV[i + offset]
      end
    end
    if later then
      redis.call('ZADD', SCHEDULE, run_at, id)
      redis.call('HSET', key, 's', 's', unpack(fields))
      scheduled = scheduled + 1
    else
      local seq = enter_list(id, priority, tenant, now, false)
      redis.call('HSET', key, 's', 'w', 'q', seq, 'w', now, unpack(fields))
      held = held + 1
    end
    add_tenant(tenant, 1)
  end
  answers[#answers + 1] = answer
end
save()
return answers
