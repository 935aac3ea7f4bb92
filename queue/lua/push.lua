#!lua
-- Stores jobs that are not known yet: waiting now, or scheduled.
-- Refused by Redis itself when its memory is full, because it has no allow-oom flag.
--
-- KEYS[1]  the partition
-- ARGV[1]  now_ms, or '' for Redis' clock
-- ARGV[2]  window: how many jobs may wait, and how many may be scheduled
-- ARGV[3]  a random name for this life of the data, if it has none yet
-- ARGV[4]  '1' if maximum depths and draining hold: a job that a ledger has accepted is never refused for them
-- ARGV[5…] 5 per job: id, priority, tenant, run_at_ms or '', rest of the record
-- Returns  one number per job: 1 queued, 0 was present (left as it is), 2 the window is full, 3 the queue has its maximum
--          depth, 4 the tenant has its maximum depth, 5 the queue drains
-- Complexity: O(jobs), O(log n) for a scheduled one; the caller sends at most 500 jobs
--@ partition.lua
--@ policies.lua
local now, window = clock(ARGV[1]), tonumber(ARGV[2])
begin_epoch(ARGV[3])
local held, scheduled = depth(count) + count.z, redis.call('ZCARD', SCHEDULE)
local ids, records, due, since = {}, {}, {}, whole(now)
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
    for priority = 0, 9 do waits[tenant] = waits[tenant] + redis.call('LLEN', list_key(priority, tenant)) end
  end
  return waits[tenant] >= limits[tenant]
end

for i = 5, #ARGV, 5 do ids[#ids + 1] = ARGV[i] end
-- By id: what is known already, and what this call stores.
local known, there = {}, redis.call('HMGET', JOBS, unpack(ids))
for i, id in ipairs(ids) do known[id] = there[i] end

for i, id in ipairs(ids) do
  local at = 5 * i
  local priority, tenant, run_at = ARGV[at + 1], ARGV[at + 2], tonumber(ARGV[at + 3])
  local later = run_at and run_at > now
  local answer = 1
  if known[id] then
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
    known[id] = true
    local seq = '0'
    if later then
      due[#due + 1] = ARGV[at + 3]
      due[#due + 1] = id
      add_tenant(tenant, 1)
      scheduled = scheduled + 1
    else
      seq = enter_list(id, priority, tenant, since, false)
      held = held + 1
    end
    records[#records + 1] = id
    records[#records + 1] = record(seq, priority, since, tenant, ARGV[at + 4])
    if waits[tenant] then waits[tenant] = waits[tenant] + 1 end
  end
  answers[i] = answer
end
if #records > 0 then redis.call('HSET', JOBS, unpack(records)) end
if #due > 0 then redis.call('ZADD', SCHEDULE, unpack(due)) end
save()
return answers
