# A job that is dispatched with a payload.
job "compat-dispatch" {
  type = "batch"
  parameterized {
    payload       = "required"
    meta_required = ["who"]
  }
  group "g" {
    task "work" {
      driver = "docker"
      config {
        image   = "polydev-busybox:1"
        command = "sh"
        args    = ["-c", <<-EOT
          echo $NOMAD_META_who; cat /local/payload; sleep 1
          EOT
        ]
      }

      dispatch_payload {
        file = "payload"
      }

      resources {
        cpu    = 20
        memory = 32
      }
    }
  }
}
