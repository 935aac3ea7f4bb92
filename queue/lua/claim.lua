#!lua flags=allow-oom
-- Leases waiting jobs: highest priority first; tenants of one priority take turns; every fourth job is one that has
-- waited longer than `aging` in a lower priority, if there is any: by turns the one whose head has waited longest, and that of
-- the next such priority, so that none waits for all that is older in another.
-- With policies: nothing of a paused queue; priorities by weight instead; tenants by weight; within every limit.
--
-- KEYS[1]  the partition
-- ARGV[1]  now_ms, or '' for Redis' clock
-- ARGV[2]  how many jobs at most
-- ARGV[3]  lease, ms
-- ARGV[4]  aging, ms
-- ARGV[5]  how many stale entries to drop, and blocked tenants to park, at most
-- ARGV[6]  random text, unique to this claim: the token of its leases
-- ARGV[7]  the worker
-- ARGV[8]  '1' if nothing may be claimed before the partition has been given its policies
-- Returns  {epoch, 1 if a further claim would find something or 2 if the policies are missing, ms until a limit lets a claim
--          go on or 0 if time alone doesn't, then 2 per job: id, record}
-- Complexity: O(claimed * log(leased) + dropped + parked * log(parked) + priorities); a call on an empty partition is one
--          HMGET
--@ partition.lua
--@ policies.lua
begin_epoch(ARGV[6])
if ARGV[8] == '1' and not synced then return { epoch, 2, 0 } end
if depth(count) == 0 and count.z == 0 then return { epoch, 0, 0 } end

local now, max = clock(ARGV[1]), tonumber(ARGV[2])
local expiry, aging, may_drop = whole(now + tonumber(ARGV[3])), tonumber(ARGV[4]), tonumber(ARGV[5])
local token, worker = ARGV[6], ARGV[7]
local rings, lists, heads = {}, {}, {}
-- A bucket's fractions are not exact.
local ALMOST = 1 - 1e-6
local answer, claimed = { epoch, 0, 0 }, 0

-- The tokens of the bucket in this hash now. One that was never used is full. One that was last used in the future goes on
-- from now: the clock went back, and would fill nothing until it is there again.
local function refill(key, rate, burst, tokens, at)
  if not tokens then return burst end
  if at > now then
    at = now
    redis.call('HSET', key, 'at', now)
  end
  return math.min(burst, tokens + (now - at) * rate / 1000)
end

-- How long until a bucket has a whole token, ms, at least 1.
local function until_token(rate, tokens) return math.max(1, math.ceil((1 - tokens) / rate * 1000)) end

-- The queue's policy: what it leaves of `max`, the weights of priorities, and each ring's turn.
local queue, room, tokens, weights, ahead, turn
local function numbers(text)
  local list = {}
  for number in string.gmatch(text, '[^,]+') do list[#list + 1] = tonumber(number) end
  return list
end
if policies > 0 then
  queue = redis.call('HMGET', part .. ':p', 'pause', 'weights', 'conc', 'rate', 'burst', 'tok', 'at', 'pass', 'turn', 'cb')
  if queue[1] then return answer end
  weights = queue[2] and numbers(queue[2])
  ahead = weights and numbers(queue[8] or '0,0,0,0,0,0,0,0,0,0')
  turn = numbers(queue[9] or '0,0,0,0,0,0,0,0,0,0')
  local most = queue[3] and math.min(tonumber(queue[3]), tonumber(queue[10]) or NEVER)
  room = most and math.max(0, most - redis.call('ZCARD', LEASES)) or NEVER
  if queue[4] then
    queue[4], queue[5] = tonumber(queue[4]), tonumber(queue[5])
    tokens = refill(part .. ':p', queue[4], queue[5], tonumber(queue[6]), tonumber(queue[7]))
  end
  max = math.min(max, room, tokens and math.floor(tokens + 1 - ALMOST) or NEVER)
end

-- The part of the ring that this claim can reach, read once: a few more tenants than jobs, as some may be parked. A tenant that was served and has more moves to the end
-- of `names`; those places are reached only if the whole ring was read.
local reach = policies >= 2 and max + 64 or max
local function ring_of(priority)
  local ring = rings[priority]
  if not ring then
    local names = redis.call('LRANGE', ring_key(priority), 0, reach - 1)
    ring = { names = names, head = 1, read = #names, whole = #names < reach, served = {}, lists = {} }
    rings[priority] = ring
  end
  return ring
end

-- Whether nobody can be in the ring: a list has an entry for each job that waits in it, besides stale ones.
local function is_empty(priority) return count[WAITING[priority]] == 0 and count.z == 0 end

local function next_tenant(priority)
  local ring = ring_of(priority)
  if ring.head <= ring.read or ring.whole then return ring.names[ring.head] end
end

local function end_turn(priority, tenant, has_more)
  local ring = ring_of(priority)
  ring.head = ring.head + 1
  heads[priority] = nil
  if turn then turn[priority + 1] = 0 end
  if has_more then ring.names[#ring.names + 1] = tenant end
end

-- The tenants' policies that this claim met; `false` for a tenant that has none.
local rules = {}
local function rule_of(tenant)
  if policies < 2 then return false end
  local rule = rules[tenant]
  if rule == nil then
    local raw =
      redis.call('HMGET', policy_key(tenant), 'rev', 'pause', 'w', 'conc', 'rate', 'burst', 'tok', 'at', 'n', 'b', 'cb', 'lim')
    rule = raw[1] and {
      paused = raw[2],
      weight = tonumber(raw[3]) or 1,
      concurrency = raw[4] and math.min(tonumber(raw[4]), tonumber(raw[11]) or NEVER),
      lent = raw[12],
      rate = tonumber(raw[5]),
      held = tonumber(raw[9]) or 0,
      left = raw[10] or '',
      served = 0,
    } or false
    if rule and rule.rate then
      rule.tokens = refill(policy_key(tenant), rule.rate, tonumber(raw[6]), tonumber(raw[7]), tonumber(raw[8]))
    end
    rules[tenant] = rule
  end
  return rule
end

-- Takes the tenant whose turn it is out of the ring if a limit holds it back. Returns whether it did.
local function park(priority, tenant, rule)
  local why, ready = nil, NEVER
  if rule.paused then
    why = 'p'
  elseif rule.concurrency and rule.held >= rule.concurrency then
    why = 'c'
  elseif rule.rate and rule.tokens < ALMOST then
    why, ready = 'r', now + until_token(rule.rate, rule.tokens)
  end
  if not why then return false end
  rule.left = rule.left .. priority
  redis.call('HSET', policy_key(tenant), 'b', rule.left, 'y', why)
  redis.call('ZADD', PARKED, ready, tenant)
  if why == 'c' and rule.lent then line_up(tenant, 'NX') end
  end_turn(priority, tenant, false)
  may_drop = may_drop - 1
  return true
end

-- After a job: the tenant stays in front until its weight is used up.
local function served(priority, tenant, rule, has_more)
  local left = 0
  if rule then
    rule.served = rule.served + 1
    if rule.rate then rule.tokens = rule.tokens - 1 end
    if rule.concurrency then rule.held = rule.held + 1 end
    left = turn[priority + 1] > 0 and math.min(turn[priority + 1], rule.weight) or rule.weight
    left = left - 1
  end
  if left > 0 and has_more then
    turn[priority + 1] = left
  else
    end_turn(priority, tenant, has_more)
  end
end

-- A tenant's list as this claim sees it. One job is popped; for more, growing parts are read and cut off at the end.
local NONE = {}
local function list_of(priority, tenant)
  local key = list_key(priority, tenant)
  local list = lists[key]
  if not list then
    list = { key = key, left = redis.call('LLEN', key), entries = NONE, head = 1, part = 1, taken = 0 }
    lists[key] = list
  end
  return list
end

local function take_first(list)
  list.left = list.left - 1
  if list.part == 1 then
    list.part = 4
    return redis.call('LPOP', list.key)
  end
  if not list.entries[list.head] then
    list.entries = redis.call('LRANGE', list.key, list.taken, list.taken + list.part - 1)
    list.head, list.part = 1, math.min(list.part * 4, 256)
  end
  list.head, list.taken = list.head + 1, list.taken + 1
  return list.entries[list.head - 1]
end

-- An entry's id, and its sequence with the space behind it. A pattern would cost twice as much.
local function cut(entry)
  local id_end = string.find(entry, ' ', 1, true)
  local seq_end = string.find(entry, ' ', id_end + 1, true)
  return string.sub(entry, 1, id_end - 1), string.sub(entry, id_end + 1, seq_end)
end

-- `seq` with the space behind it.
local function is_current(text, seq) return text and string.find(text, seq, 1, true) == 1 end

-- The next job of the tenant whose turn it is, or nil if the tenant was parked or only stale entries were found.
local function serve(priority)
  local tenant = next_tenant(priority)
  local rule = rule_of(tenant)
  if rule and park(priority, tenant, rule) then return end
  local list = list_of(priority, tenant)
  heads[priority] = nil
  while list.left > 0 and may_drop > 0 do
    local id, seq = cut(take_first(list))
    -- Without a stale entry in the whole partition this one needs no look; all records are read together afterwards.
    if count.z == 0 or is_current(redis.call('HGET', JOBS, id), seq) then
      served(priority, tenant, rule, list.left > 0)
      return id, seq, tenant, rule and rule.concurrency and rule
    end
    may_drop = may_drop - 1
    add('z', -1)
    add_tenant(tenant, 1)
  end
  if list.left == 0 then end_turn(priority, tenant, false) end
end

-- Since when the next job of a priority has waited; false if there is none. Known until the priority is served.
local function head_of(priority)
  local since = heads[priority]
  if since ~= nil then return since end
  since = false
  if count[WAITING[priority]] > 0 then
    local tenant
    if rings[priority] then tenant = next_tenant(priority) else tenant = redis.call('LINDEX', ring_key(priority), 0) end
    local list = tenant and list_key(priority, tenant)
    local seen = lists[list]
    local entry = seen and seen.entries[seen.head] or list and redis.call('LINDEX', list, seen and seen.taken or 0)
    since = entry and tonumber(string.match(entry, '(%d+)$')) or false
  end
  heads[priority] = since
  return since
end

-- Whether this claim is one of those for jobs that have waited long. `tick` counts claims up to AGED_ROUND: in a round each
-- priority comes first once.
local AGED_ROUND = 72
local function is_for_aged() return count.tick % 4 == 3 end

-- Among the priorities below `top` whose next job has waited longer than `aging`, the one whose job has waited longest, or by
-- turns the next one.
local function aged_below(top)
  local oldest, found = now - aging, nil
  local by_age, first = count.tick % 8 == 3, math.floor(count.tick / 8)
  for step = 0, 8 do
    local priority = (first + step) % 9
    local since = priority < top and head_of(priority)
    if since and since < oldest then
      oldest, found = since, priority
      if not by_age then return found end
    end
  end
  return found
end

-- Weighted: the priority that is least ahead of its share, the higher of two. `base` is how far that is; a priority that
-- had nothing meanwhile starts there, with neither a debt nor a claim on the past.
local base = 0
local function lightest()
  local found
  for priority = 9, 0, -1 do
    if not is_empty(priority) and next_tenant(priority) and (not found or ahead[priority + 1] < ahead[found + 1]) then found = priority end
  end
  return found
end

-- Strict: the highest priority with a tenant in its ring, or by turns one below it. If none of those is old enough now, none
-- will be in this claim.
local top, nothing_aged = 9, false
local function top_or_aged()
  if nothing_aged or not is_for_aged() then return top end
  local priority = aged_below(top)
  nothing_aged = not priority
  return priority or top
end

local function highest()
  local ring = rings[top]
  if ring and ring.head <= ring.read then return top_or_aged() end
  while top >= 0 and (is_empty(top) or not next_tenant(top) and ring_of(top).whole) do top = top - 1 end
  if top < 0 or not next_tenant(top) then return end
  return top_or_aged()
end

-- Who was kept waiting by a rate, and may go on.
if policies >= 2 and max > 0 then
  local ready = redis.call('ZRANGE', PARKED, '-inf', now, 'BYSCORE', 'LIMIT', 0, max)
  for _, tenant in ipairs(ready) do unpark(tenant, redis.call('HGET', policy_key(tenant), 'b')) end
end

local ids, seqs, owners, counting = {}, {}, {}, {}

local function nothing_below(top)
  for priority = top - 1, 0, -1 do
    if count[WAITING[priority]] > 0 then return false end
  end
  return true
end

-- Where neither policies nor stale entries need a look: what a turn of `serve` does for each entry.
local function take_plainly(entry)
  claimed = claimed + 1
  ids[claimed], seqs[claimed] = cut(entry)
end

local function took_plainly(priority, jobs)
  add(WAITING[priority], -jobs)
  count.tick = (count.tick + jobs) % AGED_ROUND
end

-- A turn for each of the next tenants of a ring longer than the claim, which meets each once. Whether they have more is asked
-- of all together at the end.
local function serve_once(priority, ring, turns)
  local prefix, before = list_key(priority, ''), claimed
  for place = ring.head, ring.head + turns - 1 do
    local tenant = ring.names[place]
    local list = prefix .. tenant
    local entry = redis.call('LPOP', list)
    if entry then
      take_plainly(entry)
      ring.served[#ring.served + 1], ring.lists[#ring.lists + 1] = tenant, list
    end
  end
  ring.head = ring.head + turns
  took_plainly(priority, claimed - before)
end

-- All turns that are left, where no other tenant and no other priority waits.
local function serve_alone(priority, ring, tenant, list)
  local jobs = math.min(max - claimed, list.left)
  for _, entry in ipairs(redis.call('LPOP', list.key, jobs)) do take_plainly(entry) end
  list.left = list.left - jobs
  took_plainly(priority, jobs)
  end_turn(priority, tenant, list.left > 0)
end

local function serve_plainly(priority)
  local ring = ring_of(priority)
  local tenant = ring.names[ring.head]
  local key = list_key(priority, tenant)
  heads[priority] = nil
  if not ring.whole and not lists[key] then
    local all = nothing_aged and priority == top
    return serve_once(priority, ring, all and math.min(max - claimed, ring.read - ring.head + 1) or 1)
  end
  local list = list_of(priority, tenant)
  -- An old job of the lowest priority has one turn alone: the higher ones wait, too.
  if priority == top and list.part == 1 and list.left > 0 and ring.head == #ring.names and nothing_below(priority) then
    return serve_alone(priority, ring, tenant, list)
  end
  if list.left > 0 then
    take_plainly(take_first(list))
    took_plainly(priority, 1)
  end
  end_turn(priority, tenant, list.left > 0)
end

-- Those whom `serve_once` served and who have more go to the end of their rings. In a slot that is being moved a command over
-- several keys fails when one is missing: then each is asked for by itself.
local function keep_in_rings()
  for _, ring in pairs(rings) do
    local all = #ring.lists == 0 or redis.pcall('EXISTS', unpack(ring.lists)) == #ring.lists
    for i, tenant in ipairs(ring.served) do
      if all or redis.call('EXISTS', ring.lists[i]) == 1 then ring.names[#ring.names + 1] = tenant end
    end
  end
end

while claimed < max and may_drop > 0 do
  local priority
  if weights then priority = lightest() else priority = highest() end
  -- Either nothing is left, or stale entries used up the part of the ring that was read: the next claim goes on there.
  if not priority then break end
  local id, seq, tenant, rule
  if policies == 0 and count.z == 0 then
    serve_plainly(priority)
  else
    id, seq, tenant, rule = serve(priority)
  end
  if id then
    claimed = claimed + 1
    ids[claimed], seqs[claimed], owners[claimed], counting[claimed] = id, seq, tenant, rule
    add(WAITING[priority], -1)
    count.tick = (count.tick + 1) % AGED_ROUND
    if weights then
      base = ahead[priority + 1]
      ahead[priority + 1] = base + 1 / weights[priority + 1]
    end
  end
end

keep_in_rings()

-- Nothing is left in any ring: whoever waits is parked.
local function all_parked()
  for priority = 0, 9 do
    if next_tenant(priority) or not ring_of(priority).whole then return false end
  end
  return true
end

local more = depth(count) > 0 or count.z > 0
count.i = 0
if more and policies > 0 then
  if claimed == max and (claimed == room or tokens and tokens - claimed < ALMOST) then
    more = false
    if claimed == room then count.i = 2 end
    if tokens and tokens - claimed < ALMOST then answer[3] = until_token(queue[4], tokens - claimed) end
  elseif claimed < max and may_drop > 0 and all_parked() then
    more, count.i = false, 1
    local first = redis.call('ZRANGE', PARKED, 0, 0, 'WITHSCORES')
    if first[2] and tonumber(first[2]) < NEVER then answer[3] = math.max(1, tonumber(first[2]) - now) end
  end
end

for priority, ring in pairs(rings) do
  local taken = math.min(ring.head - 1, ring.read)
  if taken > 0 then redis.call('LTRIM', ring_key(priority), taken, -1) end
  local back = {}
  for place = math.max(ring.head, ring.read + 1), #ring.names do back[#back + 1] = ring.names[place] end
  if #back > 0 then redis.call('RPUSH', ring_key(priority), unpack(back)) end
end
for _, list in pairs(lists) do
  if list.taken > 0 then redis.call('LTRIM', list.key, list.taken, -1) end
end

-- The leases, all at once.
if claimed > 0 then
  local holders, leases, records = {}, {}, redis.call('HMGET', JOBS, unpack(ids))
  local plain, at, place = holder_of(token, '', worker), #answer, 1
  for i = 1, claimed do
    local id, record, rule = ids[i], records[i], counting[i]
    if is_current(record, seqs[i]) then
      answer[at + place], answer[at + place + 1] = id, record
      leases[place], leases[place + 1] = expiry, id
      holders[place], holders[place + 1] = id, rule and holder_of(token, owners[i], worker) or plain
      place = place + 2
    elseif rule then
      rule.held = rule.held - 1
    end
  end
  if #leases > 0 then
    redis.call('HSET', HOLDERS, unpack(holders))
    redis.call('ZADD', LEASES, unpack(leases))
  end
end
for tenant, rule in pairs(rules) do
  if rule and rule.served > 0 then
    if rule.concurrency then redis.call('HSET', policy_key(tenant), 'n', rule.held) end
    if rule.rate then redis.call('HSET', policy_key(tenant), 'tok', rule.tokens, 'at', now) end
  end
end
if claimed > 0 and queue then
  if tokens then redis.call('HSET', part .. ':p', 'tok', tokens - claimed, 'at', now) end
  if weights then
    for place = 1, 10 do ahead[place] = math.max(0, ahead[place] - base) end
    redis.call('HSET', part .. ':p', 'pass', table.concat(ahead, ','))
  end
end
if queue and table.concat(turn, ',') ~= (queue[9] or '0,0,0,0,0,0,0,0,0,0') then
  redis.call('HSET', part .. ':p', 'turn', table.concat(turn, ','))
end
save()
if more then answer[2] = 1 end
return answer
