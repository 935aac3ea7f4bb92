#!lua flags=allow-oom
-- Stores the queue's policy and tenants' policies, unless the partition has them in a newer revision, or in the same and for
-- as many partitions: rates, depths and grants are parts of a limit.
-- A tenant whose policy changed goes back into its rings; the claim that meets it parks it again if it must.
--
-- KEYS[1]  the partition
-- ARGV[1]  a random name for this life of the data, if it has none yet
-- ARGV[2]  '1' if the partition has all its policies after this call, else ''
-- ARGV[3]  among how many partitions limits are divided
-- ARGV[4…11] the queue's: revision, or '' if it isn't given, paused, draining, weights, concurrency, rate per second, burst,
--          depth; a flag is '1' or '', an absent limit is '', a concurrency that is lent is 'lend <limit>'
-- ARGV[12…] 8 per tenant: tenant, revision, paused, weight, concurrency, rate per second, burst, depth
-- Returns  {how many policies were taken}
-- Complexity: O(tenants * log(parked)); the caller sends at most 500 tenants
--@ partition.lua
--@ policies.lua
begin_epoch(ARGV[1])
local bits, taken, parts = policies, 0, ARGV[3]

-- Writes a policy if it is newer, or for other parts. Returns whether it was, and whether it holds anything back.
local function store(key, names, first)
  local revision, has = tonumber(ARGV[first]), redis.call('HMGET', key, 'rev', 'of', 'cv')
  local before, of, version = tonumber(has[1] or -1), has[2], has[3]
  if not revision or revision < before or revision == before and of == parts then return false, false end
  local set, holds = { 'rev', ARGV[first], 'of', parts }, false
  for i, name in ipairs(names) do
    local value = ARGV[first + i]
    local lent = string.match(value, '^lend (%d+)$')
    if value ~= '' then holds = true end
    if value == '' then
      redis.call('HDEL', key, name)
      if name == 'conc' then redis.call('HDEL', key, 'cv', 'cb', 'lim') end
      if name == 'rate' then redis.call('HDEL', key, 'tok', 'at') end
      if name == 'weights' then redis.call('HDEL', key, 'pass') end
    elseif lent then
      set[#set + 1] = 'lim'
      set[#set + 1] = lent
      -- Nothing is lent yet, unless a limit was lent before. A whole limit of before is no loan, nor is a part among others.
      if not version or of and of ~= parts then
        set[#set + 1] = 'conc'
        set[#set + 1] = 0
        set[#set + 1] = 'cv'
        set[#set + 1] = version or 0
      end
    else
      if name == 'conc' then redis.call('HDEL', key, 'cv', 'cb', 'lim') end
      set[#set + 1] = name
      set[#set + 1] = value
    end
  end
  redis.call('HSET', key, unpack(set))
  taken = taken + 1
  return true, holds
end

local newer, holds =
  store(part .. ':p', { 'pause', 'drain', 'weights', 'conc', 'rate', 'burst', 'depth' }, 4)
if newer then bits = bits - bits % 2 + (holds and 1 or 0) end
for i = 12, #ARGV, 8 do
  -- Revision first, as `store` wants it; the tenant stands before it.
  local key = policy_key(ARGV[i])
  newer, holds = store(key, { 'pause', 'w', 'conc', 'rate', 'burst', 'depth' }, i + 1)
  -- Once a tenant had a policy the bit stays: leases may be counted.
  if holds and bits < 2 then bits = bits + 2 end
  if newer then
    unpark(ARGV[i], redis.call('HGET', key, 'b'))
    if redis.call('HEXISTS', key, 'lim') == 1 then line_up(ARGV[i], 'NX') end
  end
end
if bits ~= policies then redis.call('HSET', part, 'pol', bits) end
local complete = ARGV[2] == '1' and not synced
if complete then redis.call('HSET', part, 'syn', 1) end
if taken > 0 or complete then
  -- Something may be claimable now; who finds nothing goes back to sleep.
  redis.call('HDEL', part, 'i')
  redis.call('PUBLISH', part .. ':wake', depth(count))
end
return { taken }
