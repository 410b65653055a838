# A web service with a dynamic port, a check and a page from a template.
job "compat-web" {
  type = "service"

  group "g" {
    restart {
      attempts = 0
      mode     = "fail"
    }

    network {
      port "http" {
        to = 8080
      }
    }
    service {
      provider = "nomad"
      port     = "http"
      check {
        type     = "http"
        path     = "/index.html"
        interval = "1s"
        timeout  = "1s"
      }
    }
    task "web" {
      driver = "docker"
      config {
        image   = "polydev-busybox:1"
        command = "sh"
        args    = ["-c", <<-EOT
          echo serving on $NOMAD_PORT_http; exec httpd -f -p 8080 -h /local
          EOT
        ]
        ports = ["http"]
      }

      template {
        destination = "local/index.html"
        data        = "hello from {{ env \"NOMAD_TASK_NAME\" }}\n"
      }

      resources {
        cpu    = 20
        memory = 32
      }
    }
  }
}
