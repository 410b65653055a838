# A template that changes, and a signal for it.
job "compat-signal" {
  type = "service"

  group "g" {
    restart {
      attempts = 0
      mode     = "fail"
    }

    task "signal" {
      driver = "docker"
      config {
        image   = "polydev-busybox:1"
        command = "sh"
        args    = ["-c", <<-EOT
          trap 'echo hup; cat /local/config' HUP
          echo ready
          while :; do sleep 0.1; done
          EOT
        ]
      }

      template {
        destination   = "local/config"
        change_mode   = "signal"
        change_signal = "SIGHUP"
        data          = "{{ with nomadVar \"nomad/jobs/compat-signal\" }}{{ .word }}{{ end }}\n"
      }

      resources {
        cpu    = 20
        memory = 32
      }
    }
  }
}
