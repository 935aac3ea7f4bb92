-- What the scripts of one partition share. Not a script of its own: `--@ partition.lua` in a script is replaced by
-- this text (see src/scripts.rs).
--
-- Keys, all under one hash tag T = KEYS[1] = {<prefix>:<queue>:<partition>}:
--   T                      hash   counters: seq, tick, w0..w9 (waiting by priority), z (stale list entries), epoch
--   T:j                    hash   each job's record by id: "<sequence> <priority> <since> <tenant>", then " <charged
--                                 failures> <lost leases> <those lost alone> <1 if it runs alone now>" unless all are 0
--                                 (they count only without a ledger), a line feed, and what only clients read (see
--                                 src/record.rs). The sequence is that of its list entry, 0 if it is scheduled
--   T:x                    hash   the holder of each leased job by id: "<token> <tenant or nothing> <worker>" and spaces;
--                                 see policies.lua about the tenant. The jobs of one claim have one token
--   T:w:<priority>:<tenant> list  entries "<id> <sequence> <waiting since>"
--   T:r:<priority>         list   the ring: each tenant with a non-empty list once; its head is served next
--   T:l                    zset   leases by expiry, ms
--   T:s                    zset   scheduled jobs by due time, ms
--   T:t                    hash   by tenant, what the lengths of its lists don't tell: its scheduled jobs, less the stale
--                                 entries. So those together are its waiting and scheduled jobs
--   T:wake                 channel, told when there is something to claim again
-- What policies add to them is described in policies.lua.
--
-- A job with a holder is leased, one with sequence 0 is scheduled, any other waits. One hash for all records, instead of
-- a key for each job, lets a batch be read, written or removed by one command, and halves a job's memory.
--
-- A list entry counts only while its job has the same sequence number; numbers are never used twice in one life of the
-- data. So cancel and reprioritise need not search a list: the entry they leave behind is dropped when a claim meets it.
local part = KEYS[1]
local LEASES, SCHEDULE, TENANTS = part .. ':l', part .. ':s', part .. ':t'
local JOBS, HOLDERS = part .. ':j', part .. ':x'

local function list_key(priority, tenant) return part .. ':w:' .. priority .. ':' .. tenant end
local function ring_key(priority) return part .. ':r:' .. priority end

-- A whole number as text. Much cheaper than leaving it to Lua or Redis, which format every number as a fraction.
local function whole(number) return string.format('%d', number) end

--@ clock.lua

-- The counters are read once, changed in `count`, and written once by `save`.
local NAMES = { 'seq', 'tick', 'i', 'z', 'w0', 'w1', 'w2', 'w3', 'w4', 'w5', 'w6', 'w7', 'w8', 'w9' }
local raw = redis.call('HMGET', part, 'epoch', 'pol', 'syn', unpack(NAMES))
local epoch, policies, synced = raw[1], tonumber(raw[2] or 0), raw[3]
local count, before, tenants = {}, {}, {}
-- A ring got a tenant; a lease ended.
local grown, freed = false, false
for i, name in ipairs(NAMES) do
  count[name] = tonumber(raw[i + 3] or 0)
  before[name] = count[name]
end

-- The counter of each priority's waiting jobs, by the priority as a number and as text.
local WAITING = {
  [0] = 'w0', 'w1', 'w2', 'w3', 'w4', 'w5', 'w6', 'w7', 'w8', 'w9',
  ['0'] = 'w0', ['1'] = 'w1', ['2'] = 'w2', ['3'] = 'w3', ['4'] = 'w4',
  ['5'] = 'w5', ['6'] = 'w6', ['7'] = 'w7', ['8'] = 'w8', ['9'] = 'w9',
}

local function depth(of)
  local sum = 0
  for priority = 0, 9 do sum = sum + of[WAITING[priority]] end
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

-- `charged`: " <charged failures> <lost leases> <those lost alone> <1 if it runs alone now>", or nothing.
local function record(seq, priority, since, tenant, body, charged)
  return seq .. ' ' .. priority .. ' ' .. since .. ' ' .. tenant .. (charged or '') .. '\n' .. body
end

-- Sequence, priority, since, tenant, body and `charged` of a record, all as text; nothing if there is none.
local function read(text)
  if not text then return end
  local seq, priority, since, tenant, charged, body = string.match(text, '^(%d+) (%d+) (%d+) (%S+)([ %d]*)\n(.*)$')
  return seq, priority, since, tenant, body, charged
end

-- `charged` when a lease ends in a failure, in its loss, or in neither. Only a job that ran alone lost it alone.
local function charge(charged, failure, loss)
  local failures, losses, alone, runs = string.match(charged, '(%d+) (%d+) ?(%d*) ?(%d*)')
  alone = (tonumber(alone) or 0) + (runs == '1' and loss or 0)
  return string.format(' %d %d %d 0', (failures or 0) + failure, (losses or 0) + loss, alone)
end

-- Redis looks for a field of a small hash from its beginning, unless a value is longer than 64 bytes (by default): then it keeps a table.
-- `tenant` is '' if the lease counts towards no limit.
local function holder_of(token, tenant, worker) return string.format('%-65s', token .. ' ' .. tenant .. ' ' .. worker) end

local function into_ring(priority, tenant)
  redis.call('RPUSH', ring_key(priority), tenant)
  grown = true
end

-- Enters the job into its list and returns its sequence number; the caller stores that in the record. What goes to
-- the end of a list is gathered and pushed by `save`.
local entering = {}
local function enter_list(id, priority, tenant, since, front)
  count.seq = count.seq + 1
  local list, seq = list_key(priority, tenant), whole(count.seq)
  local entry = id .. ' ' .. seq .. ' ' .. since
  if front then
    if redis.call('LPUSH', list, entry) == 1 then into_ring(priority, tenant) end
  else
    local group = entering[list]
    if not group then
      group = { priority = priority, tenant = tenant, list = list }
      entering[list], entering[#entering + 1] = group, group
    end
    group[#group + 1] = entry
  end
  add(WAITING[priority], 1)
  return seq
end

local function enter_gathered()
  for _, group in ipairs(entering) do
    if redis.call('RPUSH', group.list, unpack(group)) == #group then into_ring(group.priority, group.tenant) end
  end
end

-- One command for each step, however many tenants there are.
local function save_tenants()
  if not next(tenants) then return end
  local names, set, gone = {}, {}, {}
  for tenant, by in pairs(tenants) do
    if by ~= 0 then names[#names + 1] = tenant end
  end
  if #names == 0 then return end
  local held = redis.call('HMGET', TENANTS, unpack(names))
  for i, tenant in ipairs(names) do
    local jobs = tonumber(held[i] or 0) + tenants[tenant]
    if jobs ~= 0 then
      set[#set + 1] = tenant
      set[#set + 1] = whole(jobs)
    elseif held[i] then
      gone[#gone + 1] = tenant
    end
  end
  if #set > 0 then redis.call('HSET', TENANTS, unpack(set)) end
  if #gone > 0 then redis.call('HDEL', TENANTS, unpack(gone)) end
end

-- Writes what changed, and wakes idle workers if the partition was empty and is not any more, or if what kept the last
-- claim from the jobs that wait is over.
local function save()
  enter_gathered()
  local wake = depth(before) == 0 and depth(count) > 0
  if before.i == 1 and grown or before.i == 2 and freed then
    wake, count.i = true, 0
  end
  local changed = {}
  for name, value in pairs(count) do
    if value ~= before[name] then
      changed[#changed + 1] = name
      changed[#changed + 1] = whole(value)
    end
  end
  if #changed > 0 then redis.call('HSET', part, unpack(changed)) end
  save_tenants()
  if wake then redis.call('PUBLISH', part .. ':wake', depth(count)) end
end
