#!lua flags=allow-oom
-- Extends leases that are the caller's, and tells lost leases from lost data.
--
-- KEYS[1]  the partition
-- ARGV[1]  now_ms, or '' for Redis' clock
-- ARGV[2]  lease, ms
-- ARGV[3…] 4 per job: id, token, the epoch its claim saw, 1 if the server restarted since
-- Returns  one number per job: 1 extended, 0 lost, 2 gone together with the data (the caller may restore it)
-- Complexity: O(jobs * log(leased)); the caller sends at most 500 jobs
--@ clock.lua
local part = KEYS[1]
--@ policies.lua
local now = clock(ARGV[1])
local expiry = now + tonumber(ARGV[2])
local epoch = redis.call('HGET', part, 'epoch')
local ids, leases, answers = {}, {}, {}
for i = 3, #ARGV, 4 do ids[#ids + 1] = ARGV[i] end
if #ids == 0 then return answers end
local holders = redis.call('HMGET', part .. ':x', unpack(ids))
for i, id in ipairs(ids) do
  local token, life, restarted = ARGV[4 * i], ARGV[4 * i + 1], ARGV[4 * i + 2] == '1'
  local answer = 0
  if holders[i] then
    if held_by(holders[i], token) then
      answer = 1
      leases[#leases + 1] = expiry
      leases[#leases + 1] = id
    end
  elseif epoch ~= life or restarted then
    -- Another life of the data: the job is absent, or the ledger put it back before this heartbeat came. Or the same
    -- life, but the restart may have cut off its last moments: the push, or the claim.
    local scheduled = string.sub(redis.call('HGET', part .. ':j', id) or '', 1, 2) == '0 '
    if not scheduled then answer = 2 end
  end
  answers[i] = answer
end
if #leases > 0 then redis.call('ZADD', part .. ':l', unpack(leases)) end
return answers
