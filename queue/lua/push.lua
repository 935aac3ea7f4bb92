#!lua
-- Stores jobs that are not known yet: waiting now, or scheduled.
-- Refused by Redis itself when its memory is full, because it has no allow-oom flag.
--
-- KEYS[1]  the partition
-- ARGV[1]  now_ms, or '' for Redis' clock
-- ARGV[2]  window: how many jobs may wait, and how many may be scheduled
-- ARGV[3]  a random name for this life of the data, if it has none yet
-- ARGV[4]  '1' if maximum depths and draining hold: a job that a ledger has accepted is never refused for them
-- ARGV[5…] 9 per job: id, kind, priority, tenant, run_at_ms or '', enqueued_at_ms, traceparent or '',
--          tracestate or '', fast record or ''
-- Returns  one number per job: 1 queued, 0 was present (left as it is), 2 the window is full, 3 the queue has its maximum
--          depth, 4 the tenant has its maximum depth, 5 the queue drains
-- Complexity: O(jobs), O(log n) for a scheduled one; the caller sends at most 500 jobs
--@ partition.lua
--@ policies.lua
local now, window = clock(ARGV[1]), tonumber(ARGV[2])
begin_epoch(ARGV[3])
local held, scheduled = depth(count) + count.z, redis.call('ZCARD', SCHEDULE)
local answers, waits, limits, most, drains = {}, {}, {}, NEVER, nil
local limited = ARGV[4] == '1' and policies > 0
if limited then
  local queue = redis.call('HMGET', part .. ':p', 'depth', 'drain')
  most, drains = tonumber(queue[1]) or NEVER, queue[2]
end

-- Whether the tenant has as many jobs as it may have.
local function tenant_full(tenant)
  if policies < 2 then return false end
  if not limits[tenant] then
    limits[tenant] = tonumber(redis.call('HGET', policy_key(tenant), 'depth')) or NEVER
    waits[tenant] = tonumber(redis.call('HGET', TENANTS, tenant)) or 0
  end
  return waits[tenant] + (tenants[tenant] or 0) >= limits[tenant]
end

for i = 5, #ARGV, 9 do
  local id, priority, tenant, run_at = ARGV[i], ARGV[i + 2], ARGV[i + 3], tonumber(ARGV[i + 4])
  local key, later = job_key(id), run_at and run_at > now
  local answer = 1
  if redis.call('EXISTS', key) == 1 then
    answer = 0
  elseif later and scheduled >= window or not later and held >= window then
    answer = 2
  elseif limited and drains then
    answer = 5
  elseif limited and depth(count) + scheduled >= most then
    answer = 3
  elseif limited and tenant_full(tenant) then
    answer = 4
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
