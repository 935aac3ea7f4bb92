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
local ids, records = {}, {}
for i = 1, #due, 2 do ids[#ids + 1] = due[i] end
local texts = #ids > 0 and redis.call('HMGET', JOBS, unpack(ids))
for i, id in ipairs(ids) do
  local seq, priority, _, tenant, body, charged = read(texts[i])
  if seq == '0' then
    add_tenant(tenant, -1)
    -- It waits since it was due, not since this script got to it. Scores come back as text, "1.7e+12" at worst.
    local since = string.format('%.0f', tonumber(due[2 * i]))
    records[#records + 1] = id
    seq = enter_list(id, priority, tenant, since, false)
    records[#records + 1] = record(seq, priority, since, tenant, body, charged)
  end
end
if #records > 0 then redis.call('HSET', JOBS, unpack(records)) end
if #ids > 0 then redis.call('ZREM', SCHEDULE, unpack(ids)) end
save()
local following = redis.call('ZRANGE', SCHEDULE, 0, 0, 'WITHSCORES')
return { #ids, following[2] and math.max(0, tonumber(following[2]) - now) or -1 }
