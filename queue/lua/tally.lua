#!lua flags=allow-oom
-- Adds jobs that have ended to their queues' counts, by time. A slot is written over when its time comes round again, so a
-- queue's hash has at most `slots` + `days` fields.
--
-- KEYS[1]  the registry; a queue's counts are the hash KEYS[1]:n:<queue>
-- ARGV[1]  now_ms, or '' for Redis' clock
-- ARGV[2]  length of a slot, ms
-- ARGV[3]  how many slots there are: fields "s0" and on, each "<number of its time> <ended> <dead>"
-- ARGV[4]  how many days there are: fields "d0" and on, alike
-- ARGV[5…] 3 per queue: its name, how many ended, how many of these are dead
-- Returns  how many queues were told of
-- Complexity: O(queues)
--@ clock.lua
local DAY = 86400000
local now = clock(ARGV[1])
local periods = {
  { math.floor(now / tonumber(ARGV[2])), tonumber(ARGV[3]), 's' },
  { math.floor(now / DAY), tonumber(ARGV[4]), 'd' },
}
for i = 5, #ARGV, 3 do
  local counts = KEYS[1] .. ':n:' .. ARGV[i]
  for _, period in ipairs(periods) do
    local field = period[3] .. string.format('%d', period[1] % period[2])
    local ended, dead = tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2])
    local time, before, dead_before = string.match(redis.call('HGET', counts, field) or '', '^(%d+) (%d+) (%d+)$')
    if tonumber(time) == period[1] then
      ended, dead = ended + before, dead + dead_before
    end
    redis.call('HSET', counts, field, string.format('%d %d %d', period[1], ended, dead))
  end
end
return (#ARGV - 4) / 3
