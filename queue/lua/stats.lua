#!lua flags=no-writes,allow-oom
-- Counts what the partition holds.
--
-- KEYS[1]  the partition
-- ARGV[1]  now_ms, or '' for Redis' clock
-- ARGV[2]  at how many tenants per priority to look for the oldest job, and at how many parked ones
-- Returns  {10 depths, 10 ages of the oldest in ms or -1, scheduled, leased, 1 if it is paused, parked tenants}, priorities from 0
-- Complexity: O(priorities * tenants looked at)
--@ partition.lua
--@ policies.lua
local now, most = clock(ARGV[1]), tonumber(ARGV[2])
local answer, parked = {}, parked_tenants(most)
for priority = 0, 9 do
  local since = now
  if count['w' .. priority] > 0 then
    for _, tenant in ipairs(tenants_of(priority, most, parked)) do
      -- The first of the next few entries that is not stale.
      for _, entry in ipairs(redis.call('LRANGE', list_key(priority, tenant), 0, 7)) do
        local id, seq, entered = string.match(entry, '^(%S+) (%d+) (%d+)$')
        if read(redis.call('HGET', JOBS, id)) == seq then
          since = math.min(since, tonumber(entered))
          break
        end
      end
    end
  end
  answer[priority + 1] = count['w' .. priority]
  answer[priority + 11] = count['w' .. priority] > 0 and math.max(0, now - since) or -1
end
answer[21] = redis.call('ZCARD', SCHEDULE)
answer[22] = redis.call('ZCARD', LEASES)
answer[23] = redis.call('HEXISTS', part .. ':p', 'pause')
answer[24] = redis.call('ZCARD', part .. ':b')
return answer
