#!lua flags=allow-oom
-- Leases waiting jobs: highest priority first; tenants of one priority take turns; every fourth job is one that has
-- waited longer than `aging` in a lower priority, the one whose head has waited longest, if there is any.
--
-- KEYS[1]  the partition
-- ARGV[1]  now_ms, or '' for Redis' clock
-- ARGV[2]  how many jobs at most
-- ARGV[3]  lease, ms
-- ARGV[4]  aging, ms
-- ARGV[5]  how many stale entries to drop at most
-- ARGV[6]  random text, unique to this claim: the tokens are made from it
-- ARGV[7]  the worker
-- Returns  {epoch, 1 if a further claim would find something, then 12 per job: id, token, kind, priority, tenant,
--          run_at_ms, enqueued_at_ms, traceparent, tracestate, fast record, charged failures, lost leases}
-- Complexity: O(claimed * log(leased) + dropped + priorities); a call on an empty partition is one HMGET
--@ partition.lua
begin_epoch(ARGV[6])
if depth(count) == 0 and count.z == 0 then return { epoch, 0 } end

local now, max = clock(ARGV[1]), tonumber(ARGV[2])
local expiry, aging, may_drop = now + tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local nonce, worker = ARGV[6], ARGV[7]
local rings, lengths, leases = {}, {}, {}
local answer, claimed = { epoch, 0 }, 0

-- The part of the ring that this claim can reach, read once. A tenant that was served and has more moves to the end
-- of `names`; those places are reached only if the whole ring was read.
local function ring_of(priority)
  local ring = rings[priority]
  if not ring then
    local names = redis.call('LRANGE', ring_key(priority), 0, max - 1)
    ring = { names = names, head = 1, read = #names, whole = #names < max }
    rings[priority] = ring
  end
  return ring
end

local function next_tenant(priority)
  local ring = ring_of(priority)
  if ring.head <= ring.read or ring.whole then return ring.names[ring.head] end
end

local function end_turn(priority, tenant, has_more)
  local ring = ring_of(priority)
  ring.head = ring.head + 1
  if has_more then ring.names[#ring.names + 1] = tenant end
end

-- The next job of the tenant whose turn it is, or nil if only stale entries were found.
local function serve(priority)
  local tenant = next_tenant(priority)
  local list = list_key(priority, tenant)
  lengths[list] = lengths[list] or redis.call('LLEN', list)
  while lengths[list] > 0 and may_drop > 0 do
    local id, seq = string.match(redis.call('LPOP', list), '^(%S+) (%d+)')
    lengths[list] = lengths[list] - 1
    local job = redis.call('HMGET', job_key(id), 's', 'q', 'k', 'p', 't', 'r', 'e', 'c', 'd', 'f', 'a', 'n')
    if job[1] == 'w' and job[2] == seq then
      end_turn(priority, tenant, lengths[list] > 0)
      return id, job
    end
    may_drop = may_drop - 1
    add('z', -1)
  end
  if lengths[list] == 0 then end_turn(priority, tenant, false) end
end

-- Among the priorities below `top`, the one whose next job has waited longest, if that is longer than `aging`.
local function aged_below(top)
  local oldest, found = now - aging, nil
  for priority = top - 1, 0, -1 do
    local tenant = count['w' .. priority] > 0 and next_tenant(priority)
    local entry = tenant and redis.call('LINDEX', list_key(priority, tenant), 0)
    local since = entry and tonumber(string.match(entry, '(%d+)$'))
    if since and since < oldest then oldest, found = since, priority end
  end
  return found
end

local top = 9
while claimed < max and may_drop > 0 do
  while top >= 0 and not next_tenant(top) and ring_of(top).whole do top = top - 1 end
  -- Either nothing is left, or stale entries used up the part of the ring that was read: the next claim goes on there.
  if top < 0 or not next_tenant(top) then break end
  local priority = count.tick % 4 == 3 and aged_below(top) or top
  local id, job = serve(priority)
  if id then
    claimed = claimed + 1
    local token = nonce .. ':' .. claimed
    redis.call('HSET', job_key(id), 's', 'l', 'x', token, 'o', worker)
    leases[#leases + 1] = expiry
    leases[#leases + 1] = id
    answer[#answer + 1] = id
    answer[#answer + 1] = token
    for field = 3, 12 do answer[#answer + 1] = job[field] end
    add('w' .. priority, -1)
    add_tenant(job[5], -1)
    count.tick = (count.tick + 1) % 4
  end
end

for priority, ring in pairs(rings) do
  local taken = math.min(ring.head - 1, ring.read)
  if taken > 0 then redis.call('LTRIM', ring_key(priority), taken, -1) end
  local back = {}
  for place = math.max(ring.head, ring.read + 1), #ring.names do back[#back + 1] = ring.names[place] end
  if #back > 0 then redis.call('RPUSH', ring_key(priority), unpack(back)) end
end
if #leases > 0 then redis.call('ZADD', LEASES, unpack(leases)) end
save()
if depth(count) > 0 or count.z > 0 then answer[2] = 1 end
return answer
