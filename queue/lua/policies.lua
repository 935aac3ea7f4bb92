-- What scripts share that end leases or change policies. Not a script of its own (see src/scripts.rs); it needs `part`.
--
-- Keys besides those of partition.lua, which a partition without policies doesn't have:
--   T                      two more fields: pol (1 the queue has a policy, 2 tenants have, 3 both), syn (this life of the
--                          data has been given its policies), i (why a claim found nothing although jobs wait: 1 every
--                          tenant that waits is parked, 2 the queue's concurrency is used up)
--   T:p                    hash   the queue's policy: rev, of (how many partitions it is divided among), pause,
--                                 drain, weights ("w0,…,w9"; absent: strict), conc, cv (version of a lent conc), rate (per second), burst, depth; tok and at (tokens left, and
--                                 when), pass (how far each priority is ahead, weighted), turn (what is left of the turn of
--                                 the tenant at the head of each ring)
--   T:p:<tenant>           hash   a tenant's policy: rev, of, pause, w (weight), conc, cv, rate, burst, depth; tok and at; n (its
--                                 leases that count); b (the priorities whose ring it left), y (why: p pause, c concurrency,
--                                 r rate)
--   T:need                 zset   the line of tenants whose lent concurrency should be looked at; a lent limit also has the fields lim (the
--                                 limit over all partitions) and cb (how much the lender wants to be in use at most), see
--                                 grant.lua
--   T:b                    zset   parked tenants by the time when they may go on, ms; NEVER if something else must happen
--   T:x                    names the tenant, if the lease counts towards its concurrency
--
-- A tenant that waits is, for each priority, either in the ring or in its own `b`, never in both. So a claim meets a
-- blocked tenant once per priority, and not again before it has come back.
local PARKED = part .. ':b'
local NEVER = 9007199254740991

local function policy_key(tenant) return part .. ':p:' .. tenant end

-- Whether the lease is the one with this token, and the tenant whose concurrency it counts for, if any.
local function held_by(holder, token)
  if not holder or string.find(holder, token, 1, true) ~= 1 or string.byte(holder, #token + 1) ~= 32 then return false end
  return true, string.match(holder, '^(%S+) ', #token + 2)
end

-- Puts a tenant at the end of the line for the lender: `NX` if it isn't in it, `XX` if it is.
local function line_up(tenant, whether)
  local last = redis.call('ZRANGE', part .. ':need', -1, -1, 'WITHSCORES')
  redis.call('ZADD', part .. ':need', whether, tonumber(last[2] or 0) + 1, tenant)
end

-- Puts a parked tenant back into the rings that it left. Returns whether there were any.
local function unpark(tenant, priorities)
  redis.call('ZREM', PARKED, tenant)
  redis.call('HDEL', policy_key(tenant), 'b', 'y')
  for priority in string.gmatch(priorities or '', '%d') do
    redis.call('RPUSH', part .. ':r:' .. priority, tenant)
  end
  return (priorities or '') ~= ''
end

-- By priority, as text, the first tenants of those that are parked and left its ring, `most` in all.
local function parked_tenants(most)
  local by_priority = {}
  if policies < 2 then return by_priority end
  for _, tenant in ipairs(redis.call('ZRANGE', PARKED, 0, most - 1)) do
    for priority in string.gmatch(redis.call('HGET', policy_key(tenant), 'b') or '', '%d') do
      by_priority[priority] = by_priority[priority] or {}
      table.insert(by_priority[priority], tenant)
    end
  end
  return by_priority
end

-- Of a priority, the first tenants in its ring, and then those of `parked`.
local function tenants_of(priority, most, parked)
  local names = redis.call('LRANGE', ring_key(priority), 0, most - 1)
  for _, tenant in ipairs(parked[tostring(priority)] or {}) do names[#names + 1] = tenant end
  return names
end

-- Leases that counted have ended: `counts` has how many by tenant. Returns whether a tenant came back.
local function ended(counts)
  local back = false
  for tenant, by in pairs(counts) do
    local key = policy_key(tenant)
    local left = redis.call('HINCRBY', key, 'n', -by)
    if left <= 0 then redis.call('HDEL', key, 'n') end
    local policy = redis.call('HMGET', key, 'y', 'b', 'conc', 'cb')
    local most = math.min(tonumber(policy[3]) or NEVER, tonumber(policy[4]) or NEVER)
    if policy[1] == 'c' and left < most then back = unpark(tenant, policy[2]) or back end
  end
  return back
end
