#!lua flags=allow-oom
-- Moves scheduled jobs whose time has come to the end of their lists.
--
-- KEYS[1]  the partition
-- ARGV[1]  now_ms, or '' for Redis' clock
-- ARGV[2]  how many at most
-- Returns  {how many were moved, ms until the next is due or -1 if none is scheduled}
-- Complexity: O(moved * log(scheduled))
--@ partition.lua
local now, max = clock(ARGV[1]), tonumber(ARGV[2])
local due = redis.call('ZRANGE', SCHEDULE, '-inf', now, 'BYSCORE', 'LIMIT', 0, max, 'WITHSCORES')
local ids = {}
for i = 1, #due, 2 do
  local id, since = due[i], due[i + 1]
  local key = job_key(id)
  local job = redis.call('HMGET', key, 's', 'p', 't')
  if job[1] == 's' then
    -- It waits since it was due, not since this script got to it. Scores come back as text, "1.7e+12" at worst.
    since = string.format('%.0f', tonumber(since))
    local seq = enter_list(id, job[2], job[3], since, false)
    redis.call('HSET', key, 's', 'w', 'q', seq, 'w', since)
  end
  ids[#ids + 1] = id
end
if #ids > 0 then redis.call('ZREM', SCHEDULE, unpack(ids)) end
save()
local following = redis.call('ZRANGE', SCHEDULE, 0, 0, 'WITHSCORES')
return { #ids, following[2] and math.max(0, tonumber(following[2]) - now) or -1 }
