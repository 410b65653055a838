# A CI runner with an entry point, a user, a folder and groups.
job "compat-runner" {
  type = "batch"

  group "g" {
    restart {
      attempts = 0
      mode     = "fail"
    }
    reschedule {
      attempts  = 0
      unlimited = false
    }

    task "runner" {
      driver = "docker"
      user = "user"
      config {
        image      = "polydev-busybox:1"
        entrypoint = ["/bin/sh", "-c"]
        command    = "pwd; id; echo $${0} $1; sleep 1"
        args       = ["${NOMAD_TASK_NAME}", "two words"]
        work_dir   = "/tmp"
        group_add  = ["1234"]
        cap_drop   = ["all"]
        labels {
          team = "build"
        }
      }
      env {
        TOKEN_FILE = "${NOMAD_SECRETS_DIR}/token"
      }

      resources {
        cpu    = 20
        memory = 32
      }
    }
  }
}
