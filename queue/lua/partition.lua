-- What the scripts of one partition share. Not a script of its own: `--@ partition.lua` in a script is replaced by
-- this text (see src/scripts.rs).
--
-- Keys, all under one hash tag T = KEYS[1] = {<prefix>:<queue>:<partition>}:
--   T                      hash   counters: seq, tick, w0..w9 (waiting by priority), z (stale list entries), epoch
--   T:j:<id>               hash   one job: s state (w waiting, s scheduled, l leased), q sequence of its list entry,
--                                 p priority, t tenant, w waiting since, k kind, e enqueued at, r run at, c traceparent,
--                                 d tracestate, f fast record, x lease token, o owner (worker),
--                                 a charged failures, n lost leases (absent at 0; they count only without a ledger)
--   T:w:<priority>:<tenant> list  entries "<id> <sequence> <waiting since>"
--   T:r:<priority>         list   the ring: each tenant with a non-empty list once; its head is served next
--   T:l                    zset   leases by expiry, ms
--   T:s                    zset   scheduled jobs by due time, ms
--   T:t                    hash   waiting + scheduled jobs by tenant
--   T:wake                 channel, told when the partition stops being empty
--
-- A list entry counts only while its job is waiting with the same sequence number; numbers are never used twice in
-- one life of the data. So cancel and reprioritise need not search a list: the entry they leave behind is dropped
-- when a claim meets it.
local part = KEYS[1]
local LEASES, SCHEDULE, TENANTS = part .. ':l', part .. ':s', part .. ':t'

local function job_key(id) return part .. ':j:' .. id end
local function list_key(priority, tenant) return part .. ':w:' .. priority .. ':' .. tenant end
local function ring_key(priority) return part .. ':r:' .. priority end

-- Redis' own clock in ms. `given` is empty except in tests.
local function clock(given)
  if given ~= '' then return tonumber(given) end
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

-- The counters are read once, changed in `count`, and written once by `save`.
local NAMES = { 'seq', 'tick', 'z', 'w0', 'w1', 'w2', 'w3', 'w4', 'w5', 'w6', 'w7', 'w8', 'w9' }
local raw = redis.call('HMGET', part, 'epoch', unpack(NAMES))
local epoch = raw[1]
local count, before, tenants = {}, {}, {}
for i, name in ipairs(NAMES) do
  count[name] = tonumber(raw[i + 1] or 0)
  before[name] = count[name]
end

local function depth(of)
  local sum = 0
  for priority = 0, 9 do sum = sum + of['w' .. priority] end
  return sum
end

local function add(name, by) count[name] = math.max(0, count[name] + by) end
local function add_tenant(tenant, by) tenants[tenant] = (tenants[tenant] or 0) + by end

-- Names this life of the data: whoever writes first into an empty partition gives it a random name.
local function begin_epoch(nonce)
  if not epoch then
    epoch = nonce
    redis.call('HSET', part, 'epoch', nonce)
  end
end

-- Appends a list entry for the job and returns its sequence number; the caller stores that in the job.
local function enter_list(id, priority, tenant, since, front)
  count.seq = count.seq + 1
  local entry = id .. ' ' .. count.seq .. ' ' .. since
  if redis.call(front and 'LPUSH' or 'RPUSH', list_key(priority, tenant), entry) == 1 then
    redis.call('RPUSH', ring_key(priority), tenant)
  end
  add('w' .. priority, 1)
  return count.seq
end

-- Writes what changed and wakes idle workers if the partition was empty and is not any more.
local function save()
  local changed = {}
  for name, value in pairs(count) do
    if value ~= before[name] then
      changed[#changed + 1] = name
      changed[#changed + 1] = value
    end
  end
  if #changed > 0 then redis.call('HSET', part, unpack(changed)) end
  for tenant, by in pairs(tenants) do
    if by ~= 0 and redis.call('HINCRBY', TENANTS, tenant, by) <= 0 then redis.call('HDEL', TENANTS, tenant) end
  end
  if depth(before) == 0 and depth(count) > 0 then redis.call('PUBLISH', part .. ':wake', depth(count)) end
end
