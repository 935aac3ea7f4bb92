#!lua flags=allow-oom
-- Removes finished jobs whose lease is the caller's.
--
-- KEYS[1]  the partition
-- ARGV     2 per job: id, token
-- Returns  one number per job: 1 removed, 0 not ours
-- Complexity: O(jobs * log(leased)); the caller sends at most 500 jobs
local part = KEYS[1]
--@ policies.lua
local keys, ids, answers, counts = {}, {}, {}, {}
for i = 1, #ARGV, 2 do
  local key = part .. ':j:' .. ARGV[i]
  local job = redis.call('HMGET', key, 's', 'x', 'h')
  local ours = job[1] == 'l' and job[2] == ARGV[i + 1]
  if ours then
    keys[#keys + 1] = key
    ids[#ids + 1] = ARGV[i]
    if job[3] then counts[job[3]] = (counts[job[3]] or 0) + 1 end
  end
  answers[#answers + 1] = ours and 1 or 0
end
if #keys > 0 then
  redis.call('DEL', unpack(keys))
  redis.call('ZREM', part .. ':l', unpack(ids))
  -- Whoever a limit kept waiting may go on.
  local back = ended(counts)
  local idle = redis.call('HGET', part, 'i')
  if idle == '2' or idle == '1' and back then
    redis.call('HDEL', part, 'i')
    redis.call('PUBLISH', part .. ':wake', 1)
  end
end
return answers
