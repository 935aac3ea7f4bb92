#!lua flags=allow-oom
-- A partition's side of a lent concurrency: how much of a limit over the whole queue it may use.
--
-- KEYS[1]  the partition
-- ARGV[1]  the tenant whose limit it is, or '' for the queue's
-- ARGV[2]  what to do:
--   'look'                 puts the tenant at the end of the line of those that need more, so that all are looked at in turn
--   'set' grant, version   takes a grant that is newer than what it has, and wakes whoever waited for it
--   'give' by, version     gives back at most `by` of what is not in use, if its version is still this one
--   'back' target          lets leases end without new ones until no more than `target` is in use
--   'fence'                makes every grant that is on its way too old
--   'done'                 takes the tenant off the line of those that need more, unless it needs more after all
-- Returns  {limit or -1 if none is lent, grant, version, in use, 1 if it needs more}, as of after the call
-- Complexity: O(log(parked) + log(the line)); O(priorities) where a tenant comes back
--@ partition.lua
--@ policies.lua
local tenant, verb = ARGV[1], ARGV[2]
local key = tenant == '' and part .. ':p' or policy_key(tenant)
local policy = redis.call('HMGET', key, 'lim', 'conc', 'cv', 'n', 'y', 'b', 'cb')
local limit, grant, version = tonumber(policy[1] or -1), tonumber(policy[2] or 0), tonumber(policy[3] or 0)
local used = tenant == '' and redis.call('ZCARD', LEASES) or tonumber(policy[4] or 0)
local back = tonumber(policy[7] or NEVER)
if limit >= 0 then
  if verb == 'set' and tonumber(ARGV[4]) > version then
    grant, version = tonumber(ARGV[3]), tonumber(ARGV[4])
    redis.call('HSET', key, 'conc', grant, 'cv', version)
    redis.call('HDEL', key, 'cb')
    back = NEVER
    if used < grant then
      freed = true
      if policy[5] == 'c' then
        grown = unpark(tenant, policy[6]) or grown
        policy[5] = false
      end
    end
  elseif verb == 'give' and tonumber(ARGV[4]) == version then
    grant, version = math.max(math.min(grant, used), grant - tonumber(ARGV[3])), version + 1
    redis.call('HSET', key, 'conc', grant, 'cv', version)
    redis.call('HDEL', key, 'cb')
    back = NEVER
  elseif verb == 'back' then
    redis.call('HSET', key, 'cb', ARGV[3])
    back = tonumber(ARGV[3])
  elseif verb == 'fence' then
    version = version + 1000000
    redis.call('HSET', key, 'cv', version)
  end
end
if verb == 'look' and tenant ~= '' then line_up(tenant, 'XX') end
if verb == 'done' and (limit < 0 or policy[5] ~= 'c') then redis.call('ZREM', part .. ':need', tenant) end
local needs
if tenant == '' then needs = count.i == 2 and used >= math.min(grant, back) else needs = policy[5] == 'c' end
save()
return { limit, grant, version, used, needs and 1 or 0 }
