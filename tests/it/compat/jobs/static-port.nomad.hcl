# A port with a number of its own.
job "compat-static-port" {
  type = "service"

  group "g" {
    restart {
      attempts = 0
      mode     = "fail"
    }

    network {
      port "fixed" {
        static = STATIC_PORT
        to     = 9000
      }
    }
    task "fixed" {
      driver = "docker"
      config {
        image   = "polydev-busybox:1"
        command = "sh"
        args    = ["-c", <<-EOT
          exec httpd -f -p 9000 -h /local
          EOT
        ]
        ports = ["fixed"]
      }

      template {
        destination = "local/index.html"
        data        = "fixed\n"
      }

      resources {
        cpu    = 20
        memory = 32
      }
    }
  }
}
