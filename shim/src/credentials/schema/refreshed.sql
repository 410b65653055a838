-- The version that was put with `keep_refreshed`, or refreshed, and by which run. Shims of before
-- these columns count on and leave them as they are: then they say nothing.
ALTER TABLE polydev_credentials ADD COLUMN kept_version BIGINT NOT NULL DEFAULT 0;
ALTER TABLE polydev_credentials ADD COLUMN refreshed_by TEXT NOT NULL DEFAULT '';
