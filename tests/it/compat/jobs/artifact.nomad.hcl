# A file that Nomad fetches.
job "compat-artifact" {
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

    task "fetch" {
      driver = "docker"
      config {
        image   = "polydev-busybox:1"
        command = "sh"
        args    = ["-c", <<-EOT
          cat /local/data/file; ls /local
          sleep 1
          EOT
        ]
      }

      artifact {
        source      = "http://127.0.0.1:ARTIFACT_PORT/file"
        destination = "local/data"
      }

      resources {
        cpu    = 20
        memory = 32
      }
    }
  }
}
