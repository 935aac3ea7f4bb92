#!lua flags=allow-oom
-- Puts jobs whose lease expired back to the front of their lists.
--
-- A reaper passes when it last looked, because after an outage of Redis the workers could not send heartbeats: every
-- lease looks expired, and a call sent during a hang would run before any heartbeat. All times are Redis' own.
-- Where the clock went back since it looked here, whoever a rate keeps waiting would wait until the clock is there again:
-- they come up for the next claim, which lets them wait by the present time.
--
-- KEYS[1]  the partition
-- ARGV[1]  now_ms, or '' for Redis' clock
-- ARGV[2]  how many at most, of leases and of tenants that wait for a rate
-- ARGV[3]  when the caller last reached Redis, ms, or '' to reap in any case
-- ARGV[4]  a longer time than this since then is an outage, ms
-- ARGV[5]  do not reap before, ms
-- ARGV[6]  when the caller last looked at this partition, ms, or ''
-- Returns  {now_ms, epoch or nil, 1 after an outage (nothing was reaped), 1 if there is more to do, ms until the next lease
--          expires (negative: it has) or nil if none is held, then the ids}
-- Complexity: O(reaped * log(leased)); after the clock went back O(max * log(parked))
--@ partition.lua
--@ policies.lua
local now, max = clock(ARGV[1]), tonumber(ARGV[2])
local last = tonumber(ARGV[3])
local outage = last and (now - last > tonumber(ARGV[4]) or now < last)
local answer, counts = { now, epoch, outage and 1 or 0, 0, false }, {}

-- The answer, with the time until the next lease expires.
local function answered()
  local following = redis.call('ZRANGE', LEASES, 0, 0, 'WITHSCORES')
  answer[5] = following[2] and tonumber(following[2]) - now or false
  return answer
end

local back = 0
if now < (tonumber(ARGV[6]) or now) then
  local waiting = redis.call('ZRANGE', PARKED, '(' .. whole(now), '(' .. whole(NEVER), 'BYSCORE', 'LIMIT', 0, max)
  for _, tenant in ipairs(waiting) do redis.call('ZADD', PARKED, 'XX', now, tenant) end
  back = #waiting
  grown = back > 0
end
answer[4] = back == max and 1 or 0
if outage or last and now < tonumber(ARGV[5]) then
  save()
  return answered()
end
local expired = redis.call('ZRANGE', LEASES, '-inf', now, 'BYSCORE', 'LIMIT', 0, max)
if #expired == max then answer[4] = 1 end
-- From the latest to the earliest, so that the one that expired first ends up in front.
for i = #expired, 1, -1 do
  local id = expired[i]
  local holder = redis.call('HGET', HOLDERS, id)
  local _, priority, since, tenant, body, charged = read(holder and redis.call('HGET', JOBS, id))
  if priority then
    local seq = enter_list(id, priority, tenant, since, true)
    redis.call('HSET', JOBS, id, record(seq, priority, since, tenant, body, charge(charged, 0, 1)))
    freed = true
    local counted = string.match(holder, '^%S+ (%S+) ')
    if counted then counts[counted] = (counts[counted] or 0) + 1 end
    answer[#answer + 1] = id
  end
end
if #expired > 0 then redis.call('HDEL', HOLDERS, unpack(expired)) end
if #expired > 0 then redis.call('ZREM', LEASES, unpack(expired)) end
if ended(counts) then grown = true end
save()
return answered()
