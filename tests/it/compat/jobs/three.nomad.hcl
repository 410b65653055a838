# Three tasks in a group, of which two fail.
job "compat-three" {
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

    task "t0" {
      driver = "docker"
      config {
        image   = "polydev-busybox:1"
        command = "sh"
        args    = ["-c", <<-EOT
          echo task 0; echo error 0 >&2; sleep 1; exit 0
          EOT
        ]
      }

      resources {
        cpu    = 20
        memory = 32
      }
    }

    task "t1" {
      driver = "docker"
      config {
        image   = "polydev-busybox:1"
        command = "sh"
        args    = ["-c", <<-EOT
          echo task 1; echo error 1 >&2; sleep 3; exit 1
          EOT
        ]
      }

      resources {
        cpu    = 20
        memory = 32
      }
    }

    task "t2" {
      driver = "docker"
      config {
        image   = "polydev-busybox:1"
        command = "sh"
        args    = ["-c", <<-EOT
          echo task 2; echo error 2 >&2; trap 'exit 2' TERM; while :; do sleep 0.1; done
          EOT
        ]
      }

      resources {
        cpu    = 20
        memory = 32
      }
    }
  }
}
