package PVE::BackupProvider::Plugin::Fleece;

# A backup provider of Proxmox VE 9 that hands everything on to `fleece provider ...`. docs/proxmox-provider.md says how
# it is installed, and which process holds what from one call to the next.

use strict;
use warnings;

use PVE::Fleece::Process;

use base qw(PVE::BackupProvider::Plugin::Base);

my $ARCHIVE_NAME = qr{(?:vm|ct)/[1-9][0-9]{2,8}/[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z};
my $DEVICE = qr{[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}};
my $NBD_URI = qr{nbd\+unix:///[A-Za-z0-9_.\-]*\?socket=/[A-Za-z0-9_.\-/]+};
my $PATH = qr{/[A-Za-z0-9_.\-/]+};

# Regions of a disk that are handed over: a disk of 16 TiB has as many chunks.
my $MAX_REGIONS = 1 << 22;

sub new {
    my ($class, $storage_plugin, $scfg, $storeid, $log_function) = @_;
    return bless {
        storage_plugin => $storage_plugin,
        scfg => $scfg,
        storeid => $storeid,
        log => $log_function // sub { },
        archives => {},
    }, $class;
}

sub provider_name { return 'Fleece' }

# What every call says of the storage.
sub storage {
    my ($scfg, $storeid) = @_;
    return {
        id => "$storeid",
        repository => "$scfg->{'fleece-repository'}",
        defined($scfg->{'fleece-namespace'}) ? (ns => "$scfg->{'fleece-namespace'}") : (),
    };
}

sub _storage { my ($self) = @_; return storage($self->{scfg}, $self->{storeid}) }

sub _call {
    my ($self, $name, $parameters) = @_;
    return PVE::Fleece::Process::call($name, { storage => $self->_storage(), %$parameters });
}

sub _session {
    my ($self, $for) = @_;
    my $session = $self->{session};
    die "there is no $for that has begun\n" if !$session || $self->{session_for} ne $for;
    return $session;
}

sub _begin {
    my ($self, $for, %options) = @_;
    $self->_finish(); # what was not cleaned up
    $self->{session_for} = $for;
    $self->{session} = PVE::Fleece::Process->start(log => $self->{log}, %options);
    return $self->{session};
}

# What the code returns; if it dies, the session ends with it.
sub _or_finish {
    my ($self, $code) = @_;
    my $result = eval { $code->() };
    if (my $error = $@) {
        eval { $self->_finish() };
        die $error;
    }
    return $result;
}

sub _finish {
    my ($self) = @_;
    my $session = delete($self->{session}) or return;
    delete($self->{session_for});
    $session->end();
    return;
}

# --- backup -----------------------------------------------------------------------------------------------------------

sub job_init {
    my ($self, $start_time) = @_;
    my $found = $self->_call('job-init', {});
    my $repository = PVE::Fleece::Process::text_in($found, 'repository', qr/[^\x00-\x1f\x7f]+/);
    $self->{log}->('info', "Fleece backs up to $repository");
    return;
}

sub job_cleanup {
    my ($self) = @_;
    $self->_finish();
    return;
}

sub backup_init {
    my ($self, $vmid, $vmtype, $start_time) = @_;
    my $session = $self->_begin('backup', stream => $vmtype eq 'lxc');
    delete($self->{archives}->{$vmid});
    my $name = $self->_or_finish(sub {
        my $answer = $session->ask(
            'backup-init',
            { storage => $self->_storage(), vmid => int($vmid), vmtype => "$vmtype", 'start-time' => int($start_time) },
            limit => $PVE::Fleece::Process::CALL_LIMIT_S,
        );
        return PVE::Fleece::Process::text_in($answer, 'archive-name', $ARCHIVE_NAME);
    });
    $self->{name} = $name;
    return { 'archive-name' => $name };
}

sub backup_cleanup {
    my ($self, $vmid, $vmtype, $success, $info) = @_;
    my $stats = $self->_or_finish(sub {
        return {} if !$success;
        my $answer = $self->_session('backup')->ask('backup-cleanup', {}, limit => $PVE::Fleece::Process::CALL_LIMIT_S);
        return { 'archive-size' => PVE::Fleece::Process::number_in($answer, 'archive-size') };
    });
    $self->{archives}->{$vmid} = $self->{name} if $success;
    # Whatever was not finished is thrown away.
    $self->_finish();
    return { stats => $stats };
}

sub backup_get_mechanism {
    my ($self, $vmid, $vmtype) = @_;
    return 'directory' if $vmtype eq 'lxc';
    return ($self->{scfg}->{'fleece-mechanism'} // '') eq 'file-handle' ? 'file-handle' : 'nbd' if $vmtype eq 'qemu';
    die "Fleece does not back up guests of the type '$vmtype'\n";
}

sub backup_handle_log_file {
    my ($self, $vmid, $filename) = @_;
    my $name = $self->{archives}->{$vmid} or return; # there is no archive that it could be kept with
    eval { $self->_call('handle-log-file', { 'archive-name' => $name, filename => "$filename" }) };
    if (my $error = $@) {
        # vzdump would end the whole job, also for the guests whose turn has not come.
        die $error if $error =~ m/\Ainterrupted by signal$/; # as vzdump tells it from a failure
        chomp($error);
        $self->{log}->('warn', "the log of $name cannot be kept: $error");
    }
    return;
}

sub backup_vm_query_incremental {
    my ($self, $vmid, $volumes) = @_;
    my $asked = { map { ("$_" => { size => int($volumes->{$_}->{size}) }) } keys(%$volumes) };
    my $answer = $self->_session('backup')->ask('backup-vm-query-incremental', { volumes => $asked });
    my $modes = PVE::Fleece::Process::part_of($answer, 'volumes', 'HASH');
    return { map { ($_ => PVE::Fleece::Process::text_in($modes, $_, qr/new|use/)) } grep { $modes->{$_} } keys(%$asked) };
}

sub backup_vm {
    my ($self, $vmid, $guest_config, $volumes, $info) = @_;
    my $session = $self->_session('backup');
    my $given = { map { ("$_" => _volume($_, $volumes->{$_})) } keys(%$volumes) };
    $session->ask('backup-vm', { volumes => $given, _guest($guest_config, $info) });
    return;
}

# What is said of a guest beside its data.
sub _guest {
    my ($guest_config, $info) = @_;
    return (
        'guest-config' => PVE::Fleece::Process::packed($guest_config),
        'firewall-config' => PVE::Fleece::Process::packed($info->{'firewall-config'}),
        'bandwidth-limit' => _limit($info->{'bandwidth-limit'}),
    );
}

# What is no number must not pass for "none".
sub _limit {
    my ($limit) = @_;
    return 0 if !defined($limit) || $limit eq '';
    die "'$limit' is no limit of bandwidth\n" if $limit !~ m/\A(-?\d{1,18})(?:\.\d*)?\z/;
    return int($1);
}

sub _volume {
    my ($device, $volume) = @_;
    my $given = { size => int($volume->{size}), 'bitmap-mode' => "$volume->{'bitmap-mode'}" };
    if (defined($volume->{'nbd-path'})) {
        $given->{'nbd-path'} = "$volume->{'nbd-path'}";
        $given->{'bitmap-name'} = "$volume->{'bitmap-name'}" if defined($volume->{'bitmap-name'});
        return $given;
    }
    my $handle = $volume->{'file-handle'};
    my @status = $handle ? stat($handle) : ();
    die "volume $device has neither an NBD path nor a file handle\n" if !@status;
    # fleece opens it by this process's own table of descriptors, and compares what it finds.
    $given->{'file-handle'} = { fd => fileno($handle), device => "$status[0]", inode => "$status[1]" };
    if (my $next = $volume->{'next-dirty-region'}) {
        my $regions = $given->{'dirty-regions'} = [];
        while (my ($offset, $length) = $next->()) {
            last if !defined($offset);
            die "volume $device has more than $MAX_REGIONS dirty regions\n" if @$regions >= $MAX_REGIONS;
            push @$regions, [int($offset), int($length)];
        }
    }
    return $given;
}

sub backup_container_prepare {
    my ($self, $vmid, $info) = @_;
    # What the fork needs is there; this finds out whether the session still is.
    $self->_session('backup')->ask('backup-container-prepare', {}, limit => $PVE::Fleece::Process::CALL_LIMIT_S);
    return;
}

sub backup_container {
    my ($self, $vmid, $guest_config, $exclude_patterns, $info) = @_;
    # The files are read here, as the container's root; the session, which is privileged, stores what comes.
    $self->_session('backup')->archive(
        'backup-container',
        { _guest($guest_config, $info) },
        {
            directory => PVE::Fleece::Process::packed($info->{directory}),
            sources => [map { PVE::Fleece::Process::packed($_) } @{ $info->{sources} // [] }],
            exclude => [map { PVE::Fleece::Process::packed($_) } @{ $exclude_patterns // [] }],
            # It belongs to the host's root. A warning in each backup would hide others.
            'skip-lost-and-found' => PVE::Fleece::Process::boolean($info->{'backup-user-id'}),
        },
    );
    return;
}

# --- restore ----------------------------------------------------------------------------------------------------------

# The name of an archive in the name of a volume.
sub archive_name {
    my ($volname) = @_;
    die "'" . ($volname // '') . "' is no archive of Fleece\n" if ($volname // '') !~ m{\A(?:backup/)?($ARCHIVE_NAME)\z};
    return $1;
}

sub restore_get_mechanism {
    my ($self, $volname) = @_;
    return ('qemu-img', 'qemu') if archive_name($volname) =~ m{\Avm/};
    return (($self->{scfg}->{'fleece-container-restore'} // '') eq 'tar' ? 'tar' : 'directory', 'lxc');
}

sub archive_get_guest_config {
    my ($self, $volname) = @_;
    my $found = $self->_call('guest-config', { 'archive-name' => archive_name($volname) });
    return PVE::Fleece::Process::unpacked($found->{config} // '', 'configuration');
}

sub archive_get_firewall_config {
    my ($self, $volname) = @_;
    my $found = $self->_call('firewall-config', { 'archive-name' => archive_name($volname) });
    return PVE::Fleece::Process::unpacked($found->{config}, 'configuration');
}

sub restore_vm_init {
    my ($self, $volname) = @_;
    my $name = archive_name($volname);
    my $session = $self->_begin('restore of a VM');
    return $self->_or_finish(sub {
        my $found = $session->ask('restore-vm-init', { storage => $self->_storage(), 'archive-name' => $name });
        my $devices = PVE::Fleece::Process::part_of($found, 'volumes', 'HASH');
        my $volumes = {};
        for my $listed (keys(%$devices)) {
            my ($device) = $listed =~ m/\A($DEVICE)\z/ or die "fleece: a disk has an impossible name\n";
            $volumes->{$device} = { size => PVE::Fleece::Process::number_in($devices->{$listed}, 'size') };
        }
        return $volumes;
    });
}

sub restore_vm_cleanup {
    my ($self, $volname) = @_;
    $self->_finish();
    return;
}

sub restore_vm_volume_init {
    my ($self, $volname, $device, $info) = @_;
    # Proxmox VE looks at the path with stat before it calls qemu-img: a URI does not pass that (pve-storage 9.0).
    my $as_file = ($self->{scfg}->{'fleece-vm-restore'} // '') ne 'nbd';
    my $answer = $self->_session('restore of a VM')->ask(
        'restore-vm-volume-init', { device => "$device", 'as-file' => PVE::Fleece::Process::boolean($as_file) },
    );
    my ($key, $pattern) = $as_file ? ('path', $PATH) : ('uri', $NBD_URI);
    return { 'qemu-img-path' => PVE::Fleece::Process::text_in($answer, $key, $pattern) };
}

sub restore_vm_volume_cleanup {
    my ($self, $volname, $device, $info) = @_;
    $self->_session('restore of a VM')->ask('restore-vm-volume-cleanup', { device => "$device" });
    return;
}

# Proxmox VE hands over the storage as well, between the volume and the rest.
sub restore_container_init {
    my ($self, $volname, @rest) = @_;
    my $name = archive_name($volname);
    my ($mechanism) = $self->restore_get_mechanism($volname);
    my $session = $self->_begin('restore of a container');
    my $path = $self->_or_finish(sub {
        my $answer = $session->ask(
            'restore-container-init',
            { storage => $self->_storage(), 'archive-name' => $name, mechanism => "$mechanism" },
        );
        return PVE::Fleece::Process::text_in($answer, 'path', $PATH);
    });
    return { ($mechanism eq 'tar' ? 'tar-path' : 'archive-directory') => $path };
}

# Proxmox VE hands over the storage as well, between the volume and the rest.
sub restore_container_cleanup {
    my ($self, $volname, @rest) = @_;
    # It tells whether the session was there to the end.
    eval { $self->_session('restore of a container')->ask('restore-container-cleanup', {}) };
    my $error = $@;
    $self->_finish();
    die $error if $error;
    return;
}

1;
