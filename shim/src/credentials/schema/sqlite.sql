CREATE TABLE polydev_credentials (
    tenant     TEXT   NOT NULL,
    user_id    TEXT   NOT NULL,
    provider   TEXT   NOT NULL,
    version    BIGINT NOT NULL,
    kind       INTEGER NOT NULL,
    key_id     TEXT   NOT NULL,
    record     BLOB   NOT NULL,
    created_at BIGINT NOT NULL,
    updated_at BIGINT NOT NULL,
    PRIMARY KEY (tenant, user_id, provider)
);
CREATE INDEX polydev_credentials_key_id ON polydev_credentials (tenant, key_id);
