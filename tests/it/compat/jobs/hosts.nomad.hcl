# Names and name servers.
job "compat-hosts" {
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

    task "hosts" {
      driver = "docker"
      config {
        image   = "polydev-busybox:1"
        command = "sh"
        args    = ["-c", <<-EOT
          grep -e db -e cache /etc/hosts
          cat /etc/resolv.conf | grep -v '^#'
          hostname
          sleep 1
          EOT
        ]
        extra_hosts        = ["db:10.0.0.5", "cache:10.0.0.6"]
        dns_servers        = ["192.0.2.53"]
        dns_search_domains = ["example.org"]
        dns_options        = ["ndots:2"]
        hostname           = "app-1"
      }

      resources {
        cpu    = 20
        memory = 32
      }
    }
  }
}
