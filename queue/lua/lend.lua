#!lua flags=allow-oom
-- The record of what a limit lends to the partitions of a queue. The sum of its grants never exceeds the limit, and no
-- partition ever has more than the record says: a grant is raised here first, and lowered in the partition first.
--
-- KEYS[1]  the record, in a slot of its own: hash p (partitions), g<partition> (grant), v<partition> (version)
-- ARGV[1]  what to do:
--   'show' partitions                    removes a record of another number of partitions
--   'adopt' then 2 per partition         makes a record that is missing from what the partitions have: grant, version
--   'raise' limit, partition, by, version  lends `by` more, as far as the limit allows; the new version is newer than `version`
--   'lower' partition, grant, version    takes over what a partition gave back, if that is newer
-- Returns  {} if the record is missing, else 2 per partition for show, {grant, version} for raise, {1 or 0} for the others
-- Complexity: O(partitions)
local record, verb = KEYS[1], ARGV[1]
local function get(name) return tonumber(redis.call('HGET', record, name) or 0) end

if verb == 'adopt' then
  if redis.call('EXISTS', record) == 1 then return { 0 } end
  for i = 2, #ARGV, 2 do
    local partition = i / 2 - 1
    redis.call('HSET', record, 'g' .. partition, ARGV[i], 'v' .. partition, ARGV[i + 1], 'p', partition + 1)
  end
  return { 1 }
end
if redis.call('EXISTS', record) == 0 then return {} end
if verb == 'show' then
  if get('p') ~= tonumber(ARGV[2]) then
    redis.call('DEL', record)
    return {}
  end
  local answer = {}
  for partition = 0, tonumber(ARGV[2]) - 1 do
    answer[#answer + 1] = get('g' .. partition)
    answer[#answer + 1] = get('v' .. partition)
  end
  return answer
end
if verb == 'raise' then
  local limit, partition, by, seen = tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])
  local sum = 0
  for other = 0, get('p') - 1 do sum = sum + get('g' .. other) end
  local grant = get('g' .. partition) + math.max(0, math.min(by, limit - sum))
  local version = math.max(get('v' .. partition), seen) + 1
  redis.call('HSET', record, 'g' .. partition, grant, 'v' .. partition, version)
  return { grant, version }
end
local partition, grant, version = ARGV[2], ARGV[3], tonumber(ARGV[4])
if version <= get('v' .. partition) then return { 0 } end
redis.call('HSET', record, 'g' .. partition, grant, 'v' .. partition, version)
return { 1 }
