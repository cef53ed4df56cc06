-- What is needed to judge stored times when a clock was set.
--
-- From this release on, `tokens.issued_at` and `tokens.expires_at` are by the database's clock, like all other
-- times of the table `refreshes`. Earlier releases stored them by the clock of the replica.

-- The token's end by the wall clock of the replica that issued it: a second witness for a replica that loads the
-- token after the database's clock was set. NULL for tokens that an earlier release has stored.
alter table tokens add column issuer_expires_at timestamptz;

-- The request for a new token (`accounts.reissue_requested_at`) that the last attempt knew of. By times alone, a
-- request would be answered for ever after the database's clock was set back.
alter table refreshes add column answered_reissue timestamptz;

update refreshes r set answered_reissue = a.reissue_requested_at
from accounts a
where a.id = r.account_id and a.reissue_requested_at <= r.attempt_started_at;
