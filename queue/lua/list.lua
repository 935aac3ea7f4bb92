#!lua flags=no-writes,allow-oom
-- One page of the jobs in one state, for people.
--
-- KEYS[1]  the partition
-- ARGV[1]  state: w waiting (by priority, tenant and place), s scheduled (soonest first), l leased (by end of lease)
-- ARGV[2]  how many to skip
-- ARGV[3]  how many at most, up to 500
-- ARGV[4]  at how many tenants per priority to look, and at how many parked ones
-- Returns  {jobs in that state, then 4 per job: id, holder or '', end of lease or due time or '', record}; holder and record
--          as in partition.lua
-- Complexity: O(priorities * tenants looked at + page * log n). A waiting page skips entries that are stale, so it may
--          be short.
--@ partition.lua
--@ policies.lua
local state, skip, limit = ARGV[1], tonumber(ARGV[2]), math.min(tonumber(ARGV[3]), 500)
local answer = {}

local function put(id, at, entered)
  local text, holder = redis.call('HGET', JOBS, id), redis.call('HGET', HOLDERS, id)
  local seq = read(text)
  local is = holder and 'l' or seq == '0' and 's' or 'w'
  if not seq or is ~= state or entered and entered ~= seq then return end
  for _, value in ipairs({ id, holder or '', at, text }) do answer[#answer + 1] = value end
end

if state == 'w' then
  local most = tonumber(ARGV[4])
  local parked = parked_tenants(most)
  answer[1] = depth(count)
  for priority = 9, 0, -1 do
    if limit <= 0 then break end
    if count['w' .. priority] > 0 then
      for _, tenant in ipairs(tenants_of(priority, most, parked)) do
        local list = list_key(priority, tenant)
        local length = redis.call('LLEN', list)
        if skip >= length then
          skip = skip - length
        elseif limit > 0 then
          for _, entry in ipairs(redis.call('LRANGE', list, skip, skip + limit - 1)) do
            local id, seq = string.match(entry, '^(%S+) (%d+)')
            put(id, '', seq)
            limit = limit - 1
          end
          skip = 0
        end
      end
    end
  end
else
  local set = state == 's' and SCHEDULE or LEASES
  answer[1] = redis.call('ZCARD', set)
  local page = limit > 0 and redis.call('ZRANGE', set, skip, skip + limit - 1, 'WITHSCORES') or {}
  for i = 1, #page, 2 do put(page[i], string.format('%.0f', tonumber(page[i + 1]))) end
end
return answer
