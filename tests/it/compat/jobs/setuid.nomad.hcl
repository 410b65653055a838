# A program that becomes another user.
job "compat-setuid" {
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

    task "setuid" {
      driver = "docker"
      user = "1000"
      config {
        image   = "polydev-setuid:1"
        command = "sh"
        args    = ["-c", <<-EOT
          id -u; /bin/id-of-root -u; sleep 1
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
