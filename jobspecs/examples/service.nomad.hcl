# A web server on a port of the host. Nomad itself checks the service.
job "example-service" {
  group "group" {
    network {
      port "http" {
        to = 8080
      }
    }

    service {
      name     = "example"
      port     = "http"
      provider = "nomad"

      check {
        type     = "http"
        path     = "/"
        interval = "2s"
        timeout  = "1s"
      }
    }

    task "task" {
      driver = "polydev"

      config {
        image   = "polydev-busybox:1"
        command = "httpd"
        args    = ["-f", "-p", "8080", "-h", "/local"]
        ports   = ["http"]
      }

      template {
        data        = "hello from {{ env \"NOMAD_ALLOC_ID\" }}\n"
        destination = "local/index.html"
      }

      resources {
        cpu    = 100
        memory = 32
      }
    }
  }
}
