-- What keeps tokens coming where a new secret has not issued one yet, and where the upstream gives the same token
-- again until it ends.

-- How often the current secret has failed in a row while the previous one was kept, and before when it is not
-- tried again. The previous one, whose pauses are in `consecutive_failures` and `next_attempt_at`, does not wait
-- for it.
alter table refreshes add column new_secret_failures integer not null default 0;
alter table refreshes add column new_secret_retry_at timestamptz;

-- When the upstream last gave the stored token again instead of a new one. An older release does not clear it, so
-- it counts only if it is not before `issued_at`.
alter table tokens add column repeated_at timestamptz;
