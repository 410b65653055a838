ALTER TABLE polydev_credentials ADD COLUMN keep_refreshed INT NOT NULL DEFAULT 0;
ALTER TABLE polydev_credentials ADD COLUMN refreshed_by TEXT NOT NULL DEFAULT '';
