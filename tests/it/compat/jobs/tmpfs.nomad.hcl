# A root that cannot be written to, with tmpfs in both forms.
job "compat-tmpfs" {
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

    task "tmpfs" {
      driver = "docker"
      config {
        image   = "polydev-busybox:1"
        command = "sh"
        args    = ["-c", <<-EOT
          mount | grep -e ' /cache ' -e ' /older ' | awk '{ print $3, $5 }' | sort
          df /cache | awk 'NR==2 { print $2 }'
          touch /cache/a /older/b && echo written
          touch /c 2>&1
          sleep 1
          EOT
        ]
        readonly_rootfs = true
        mount {
          type   = "tmpfs"
          target = "/cache"
          tmpfs_options {
            size = 1048576
          }
        }
        mounts = [
          {
            type   = "tmpfs"
            target = "/older"
          }
        ]
      }

      resources {
        cpu    = 20
        memory = 32
      }
    }
  }
}
